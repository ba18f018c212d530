"""`alexnet data verify`: decode every image as training would, and list those that cannot be decoded.

What is acceptable is what `data_pipeline.decode.pillow` says. DALI reads some files in which bits have
rotted and Pillow does not; a verified dataset is one that both read.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipeline.common.console import show_progress
from data_pipeline.common.errors import ImageError, SaveError, UserError
from data_pipeline.common.files import sha256_of
from data_pipeline.common.machine import usable_cores
from data_pipeline.common.text import printable
from data_pipeline.common.workers import map_ahead
from data_pipeline.datasets.dataset import Dataset
from data_pipeline.datasets.exclude_list import (
    QUARANTINE,
    find_exclude_list,
    names_of,
    read_exclude_list,
    write_exclude_list,
)
from data_pipeline.datasets.open import open_dataset, splits_of
from data_pipeline.decode.pillow import decode_rgb, read_header
from data_pipeline.loading.readers import MAX_BYTES_PER_PIXEL
from data_pipeline.shards.shard_format import read_manifest
from data_pipeline.shards.shard_source import ShardSource
from data_pipeline.transforms.preprocessing import Preprocessing
from data_pipeline.transforms.sampler import Int

log = logging.getLogger("data_pipeline")

CHUNK = 64
"""Images that a worker takes at once."""


@dataclass(frozen=True)
class SplitReport:
    """What was found in one split.

    Args:
        split: its name.
        num_samples: images decoded, those in quarantine included.
        bad: path relative to the data folder, and reason, of each image that cannot be decoded, in order.
        num_shards_hashed: tar shards whose content was compared with the hash in `dataset.json`.
        damaged_shards: those that differ.
    """

    split: str
    num_samples: int
    bad: tuple[tuple[str, str], ...]
    num_shards_hashed: int = 0
    damaged_shards: tuple[str, ...] = ()


@dataclass(frozen=True)
class VerifyReport:
    """What was found in a data folder.

    Args:
        quarantine: the list, if there is one now.
        num_listed: its entries, over all splits.
        num_added: those that it did not have before.
        repaired: paths that it had before and has no longer, with the reason that they had.
    """

    splits: tuple[SplitReport, ...]
    quarantine: Path | None
    num_listed: int
    num_added: int
    repaired: tuple[tuple[str, str], ...]

    @property
    def is_clean(self) -> bool:
        """Whether every image could be decoded, and every shard is what was written."""
        return not any(split.bad or split.damaged_shards for split in self.splits)


def verify(
    root: Path,
    splits: Sequence[str] = (),
    *,
    workers: int | None = None,
    max_pixels: int = Preprocessing().max_pixels,
) -> VerifyReport:
    """Decode every image of a data folder, and make `quarantine.jsonl` in it say which cannot be.

    Entries of splits that are not verified stay. A list without entries is removed. Memory holds the index,
    and one image for each worker.

    Args:
        root: the data folder, in any layout that `open_dataset` reads.
        splits: which splits; empty for all that have labels.
        workers: processes; None for one on each core.
        max_pixels: larger images are refused by their header, as training does.
    Raises:
        UserError: as `open_dataset`, or a list that is none.
        CorruptFileError: as `open_dataset`.
        SaveError: the list cannot be written.
        WorkerError: a worker was killed.
    """
    root, workers = Path(root), usable_cores() if workers is None else workers
    if workers < 1:
        raise UserError(f"--workers {workers}: at least 1")
    wanted = tuple(dict.fromkeys(splits)) or splits_of(root)
    known = find_exclude_list(root, True)
    before = read_exclude_list(known) if known is not None else {}
    datasets = [open_dataset(root, split, quarantine=False) for split in wanted]
    reports = tuple(_verify_split(dataset, workers, max_pixels) for dataset in datasets)
    bad = {name: reason for report in reports for name, reason in report.bad}
    # a split's entries are those that begin with its name, also of files that are gone, and those found in it
    checked = tuple(f"{split}/" for split in wanted)
    own = {name for name in before if name.startswith(checked)}
    own |= {name for dataset in datasets if before for name in names_of(dataset) if name in before}
    after = dict(sorted(({n: r for n, r in before.items() if n not in own} | bad).items()))
    _save(root / QUARANTINE, before, after)
    return VerifyReport(
        splits=reports,
        quarantine=root / QUARANTINE if after else None,
        num_listed=len(after),
        num_added=len(after.keys() - before.keys()),
        repaired=tuple((name, reason) for name, reason in before.items() if name not in after),
    )


def check_image(data: bytes, max_pixels: int) -> None:
    """Whether training can use an encoded image.

    Raises:
        ImageError: it cannot, and why.
    """
    height, width = read_header(data, max_pixels)
    image = decode_rgb(data)
    if (image.height, image.width) != (height, width):
        raise ImageError(
            f"its header and its pixels disagree about the size ({image.width} x {image.height})"
        )


@dataclass(frozen=True)
class _Task:
    """Some of a split's samples, and the shard to hash before them, with the hash that it should have."""

    places: Int
    samples: Dataset
    max_pixels: int
    shard: tuple[Path, str] | None


@dataclass(frozen=True)
class _Found:
    num_samples: int
    bad: tuple[tuple[int, str], ...]
    damaged: Path | None
    hashed: bool


def _run(task: _Task) -> _Found:
    damaged = None
    if task.shard is not None:
        path, expected = task.shard
        try:
            damaged = path if sha256_of(path) != expected else None
        except OSError:
            damaged = path
    bad: list[tuple[int, str]] = []
    for i, place in enumerate(task.places.tolist()):
        try:
            check_image(task.samples.read(i, MAX_BYTES_PER_PIXEL * task.max_pixels), task.max_pixels)
        except ImageError as error:
            bad.append((place, str(error)))
    return _Found(len(task.places), tuple(bad), damaged, task.shard is not None)


def _verify_split(dataset: Dataset, workers: int, max_pixels: int) -> SplitReport:
    bad: dict[int, str] = {}
    damaged: list[Path] = []
    num_hashed = 0
    tasks = _tasks(dataset, max_pixels)
    with (
        show_progress(f"verify {dataset.split}", len(dataset)) as progress,
        closing(map_ahead(_run, tasks, workers)) as results,
    ):
        for found in results:
            bad.update(found.bad)
            damaged += [found.damaged] if found.damaged is not None else []
            num_hashed += found.hashed
            progress.advance(found.num_samples, f"{len(bad)} cannot be decoded" if bad else "")
    for path in damaged:
        log.warning(
            "shard %s is not what was written: its hash differs; copy or write it again", printable(path)
        )
    return SplitReport(
        split=dataset.split,
        num_samples=len(dataset),
        bad=tuple((dataset.name_at(place), bad[place]) for place in sorted(bad)),
        num_shards_hashed=num_hashed,
        damaged_shards=tuple(str(path.relative_to(dataset.root)) for path in damaged),
    )


def _tasks(dataset: Dataset, max_pixels: int) -> Iterator[_Task]:
    """The samples in the order in which they lie on the disk: shard by shard, from its start to its end."""
    source = dataset.source
    parts: list[tuple[Int, tuple[Path, str] | None]] = [(np.arange(len(dataset), dtype=np.int64), None)]
    if isinstance(source, ShardSource):
        manifest = read_manifest(dataset.root)
        entries = [] if manifest is None else manifest.splits[dataset.split]
        hashes = {entry.name: entry.sha256 for entry in entries}
        order = np.lexsort((source.offsets, source.shard_of))
        ends = np.searchsorted(source.shard_of[order], np.arange(len(source.shards) + 1))
        parts = [
            (order[first:end], (shard, hashes[shard.name]) if shard.name in hashes else None)
            for shard, first, end in zip(source.shards, ends[:-1], ends[1:], strict=True)
        ]
    for places, shard in parts:
        for first in range(0, max(1, len(places)), CHUNK):
            chunk = places[first : first + CHUNK]
            yield _Task(chunk, dataset.take(chunk), max_pixels, shard if not first else None)


def _save(path: Path, before: dict[str, str], after: dict[str, str]) -> None:
    if list(before.items()) == list(after.items()):
        return
    if after:
        write_exclude_list(path, after)
        return
    try:
        path.unlink()
    except OSError as error:
        raise SaveError(f"{printable(path)} could not be removed: {error.strerror or error}") from error
