"""`alexnet data verify`: decode every image as training would, and list those that cannot be decoded.

`data_pipeline.decode.pillow` decides. DALI reads some files with flipped bits that Pillow refuses; a verified
dataset is one that both read.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_pipeline.common.console import show_progress
from data_pipeline.common.errors import SaveError, UserError
from data_pipeline.common.files import sha256_of
from data_pipeline.common.machine import usable_cores
from data_pipeline.common.passed_over import PassedOver
from data_pipeline.common.text import printable
from data_pipeline.common.workers import map_ahead
from data_pipeline.datasets.dataset import Dataset
from data_pipeline.datasets.exclude_list import (
    find_exclude_list,
    names_of,
    read_exclude_list,
    save_exclude_list,
    write_exclude_list,
)
from data_pipeline.datasets.open import open_dataset, splits_of
from data_pipeline.decode.pillow import decode_checked
from data_pipeline.loading.scan import MAX_PIXELS, Chunk, make_chunks
from data_pipeline.shards.shard_format import read_manifest

log = logging.getLogger("data_pipeline")


@dataclass(frozen=True)
class SplitReport:
    """The findings in one split.

    Attributes:
        split: its name.
        num_samples: images decoded, including those that the exclude list names.
        bad: path relative to the data folder, and reason, of each image that cannot be decoded, in order.
        num_shards_hashed: tar shards whose content was compared with the hash in `dataset.json`.
        damaged_shards: those that differ, relative to the data folder.
        passed_over: the files beside the images that are not read.
    """

    split: str
    num_samples: int
    bad: tuple[tuple[str, str], ...]
    num_shards_hashed: int = 0
    damaged_shards: tuple[str, ...] = ()
    passed_over: PassedOver = field(default_factory=PassedOver)


@dataclass(frozen=True)
class VerifyReport:
    """The findings in a data folder.

    Attributes:
        quarantine: the exclude list, if there is one now.
        unsaved: why the list could be written nowhere; empty if it was, or nothing had to be.
        why_elsewhere: why it is not beside the data, if it is in the user's cache.
        num_listed: its entries, over all splits.
        num_added: those that it did not have before.
        repaired: paths that it named before and no longer names, with the reason that they had.
    """

    splits: tuple[SplitReport, ...]
    quarantine: Path | None
    num_listed: int
    num_added: int
    repaired: tuple[tuple[str, str], ...]
    unsaved: str = ""
    why_elsewhere: str = ""

    @property
    def is_clean(self) -> bool:
        """Whether every image could be decoded, and every shard has the hash with which it was written."""
        return not any(split.bad or split.damaged_shards for split in self.splits)


def verify(
    root: Path, splits: Sequence[str] = (), *, workers: int | None = None, list_path: Path | None = None
) -> VerifyReport:
    """Decode every image of a data folder, and list those that cannot be decoded in its `quarantine.jsonl`.

    If that cannot be written, the list is kept in the user's cache, where training finds it. Entries of
    splits that are not verified stay. A list without entries is removed. Memory holds the index, and one
    image for each worker.

    Args:
        root: the data folder, in any layout that `open_dataset` reads.
        splits: which splits; empty for all that have labels.
        workers: processes; None for one on each core.
        list_path: another file for the list, new or such a list.
    Returns:
        The findings, also where the list could not be written.
    Raises:
        UserError: as `open_dataset`, or a malformed exclude list.
        CorruptFileError: as `open_dataset`.
        WorkerError: a worker was killed.
    """
    root, workers = Path(root), usable_cores() if workers is None else workers
    if workers < 1:
        raise UserError(f"--workers {workers}: at least 1")
    wanted = tuple(dict.fromkeys(splits)) or splits_of(root)
    known = find_exclude_list(root, list_path or True, missing_ok=True)
    before = read_exclude_list(known) if known is not None else {}
    datasets = [open_dataset(root, split, quarantine=False) for split in wanted]
    reports = tuple(_verify_split(dataset, workers) for dataset in datasets)
    bad = {name: reason for report in reports for name, reason in report.bad}
    # a split's entries are those that begin with its name, even if the file is gone, and those found in it
    checked = tuple(f"{dataset.folder}/" for dataset in datasets)
    own = {name for name in before if name.startswith(checked)}
    own |= {name for dataset in datasets if before for name in names_of(dataset) if name in before}
    after = dict(sorted(({n: r for n, r in before.items() if n not in own} | bad).items()))
    where, unsaved, why_elsewhere = None, "", ""
    try:
        where, why_elsewhere = _save(root, list_path, known, before, after)
    except SaveError as error:
        unsaved = str(error)
    return VerifyReport(
        splits=reports,
        quarantine=where,
        unsaved=unsaved,
        why_elsewhere=why_elsewhere,
        num_listed=len(after),
        num_added=len(after.keys() - before.keys()),
        repaired=tuple((name, reason) for name, reason in before.items() if name not in after),
    )


class _StoredShard(NamedTuple):
    """A shard, relative to the data folder, and the hash with which it was written."""

    root: Path
    name: str
    sha256: str


class _Found(NamedTuple):
    """Of a chunk, its bad images, by place in the split; of a shard, its name if it is damaged."""

    num_samples: int
    bad: dict[int, str]
    damaged: tuple[str, ...] = ()


def _check(task: Chunk | _StoredShard) -> _Found:
    if isinstance(task, Chunk):
        return _Found(len(task.places), task.examine(lambda _, data: decode_checked(data, MAX_PIXELS)))
    with suppress(OSError):
        if sha256_of(task.root / task.name) == task.sha256:
            return _Found(0, {})
    return _Found(0, {}, (task.name,))


def _tasks(dataset: Dataset, hashes: Mapping[str, str]) -> Iterator[Chunk | _StoredShard]:
    """All chunks of a split; each shard is hashed just before its images are read, while it is cached."""
    if (reader := dataset.reader) is None:
        yield from make_chunks(dataset, np.arange(len(dataset), dtype=np.int64))
        return
    for number, name in enumerate(reader.shards):
        if (sha256 := hashes.get(Path(name).name)) is not None:
            yield _StoredShard(dataset.root, name, sha256)
        yield from make_chunks(dataset, np.flatnonzero(reader.shard_of == number))


def _verify_split(dataset: Dataset, workers: int) -> SplitReport:
    bad: dict[int, str] = {}
    damaged: list[str] = []
    manifest = None if dataset.reader is None else read_manifest(dataset.root)
    entries = [] if manifest is None else manifest.splits[dataset.split]
    hashes = {entry.name: entry.sha256 for entry in entries}
    with (
        show_progress(f"verify {dataset.split}", len(dataset)) as progress,
        closing(map_ahead(_check, _tasks(dataset, hashes), workers)) as results,
    ):
        for found in results:
            bad |= found.bad
            damaged += found.damaged
            progress.advance(found.num_samples, f"{len(bad)} cannot be decoded" if bad else "")
    for name in damaged:
        log.warning(
            "shard %s is not what was written: its hash differs; copy or write it again",
            printable(dataset.root / name),
        )
    return SplitReport(
        split=dataset.split,
        num_samples=len(dataset),
        bad=tuple((dataset.name_at(place), bad[place]) for place in sorted(bad)),
        num_shards_hashed=len(hashes),
        damaged_shards=tuple(damaged),
        passed_over=dataset.passed_over,
    )


def _save(
    root: Path, list_path: Path | None, known: Path | None, before: dict[str, str], after: dict[str, str]
) -> tuple[Path | None, str]:
    """Write the list where it has changed: to a file that was named, or as `save_exclude_list` does."""
    same = list(before.items()) == list(after.items())
    if list_path is not None:
        if not same or known is None:
            write_exclude_list(list_path, after)
        return list_path, ""
    return (known if after else None, "") if same else save_exclude_list(root, after)
