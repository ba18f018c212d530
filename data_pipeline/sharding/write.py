"""Writes tar shards: in parallel, resumable, and the same bytes for the same input."""

from __future__ import annotations

import os
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_pipeline.common.console import show_progress
from data_pipeline.common.errors import CorruptFileError, SaveError, UserError, raising
from data_pipeline.common.files import check_writable, fsync_path, sha256_of, write_atomic
from data_pipeline.common.passed_over import log_passed_over
from data_pipeline.common.text import printable
from data_pipeline.datasets.dataset import Dataset
from data_pipeline.datasets.open import open_dataset, splits_of
from data_pipeline.decode.look import look_at
from data_pipeline.results.outputs import is_same_place
from data_pipeline.sharding.plan import (
    Int,
    check_folder,
    content_of,
    deal_samples,
    member_bytes,
    plan_hash,
    resized_share,
    sizes_of,
)
from data_pipeline.shards.shard_format import (
    BLOCK,
    FORMAT,
    MANIFEST,
    ShardEntry,
    ShardManifest,
    encode_index,
    index_path,
    make_index,
    read_index,
)

_MIN_SHARD_BYTES = 1 << 10
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30}


@dataclass(frozen=True)
class ShardReport:
    """The shards of a data folder, in numbers.

    Attributes:
        num_samples: samples in all splits.
        num_shards: shards in all splits.
        size_bytes: their bytes.
        num_reused: shards that an earlier run had finished.
        num_unchanged: images that were to be resized and were not: small enough already, or not decodable.
        num_quarantined: samples that the source's exclude list left out.
    """

    num_samples: int
    num_shards: int
    size_bytes: int
    num_reused: int
    num_unchanged: int
    num_quarantined: int


class _Settings(NamedTuple):
    resize_px: int | None
    quality: int
    plan: str


class _Shard(NamedTuple):
    """One shard of the plan: its file, and the samples that go into it."""

    dataset: Dataset
    path: Path
    samples: Int


class _Written(NamedTuple):
    entry: ShardEntry
    num_unchanged: int = 0
    reused: bool = False


def parse_size(text: str) -> int:
    """Parse a number of bytes with a unit: KB, MB, GB are powers of 1000, KiB, MiB, GiB of 1024.

    >>> parse_size("512MB"), parse_size("1GiB"), parse_size("2048")
    (512000000, 1073741824, 2048)

    Raises:
        UserError: the text is no such number.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmg]i?)?b?\s*", text.lower())
    if match is None:
        raise UserError(f"{text!r} is not a size: expected such as 512MB, 1GiB or 2048")
    return int(float(match[1]) * _UNITS[match[2] or ""])


def write_shards(
    source: Path,
    out: Path,
    *,
    shard_bytes: int = 512_000_000,
    resize_px: int | None = None,
    quality: int = 90,
    workers: int = 2,
) -> ShardReport:
    """Write every labelled split of a dataset as tar shards.

    Samples are dealt to the shards in a fixed random order, so that readers which read a tar from its start
    see mixed classes; our own reader restores the dataset's order. The same input gives the same
    bytes (with `resize_px`, on the same Pillow). Run again after a kill, it writes the missing shards.

    Args:
        source: a data folder of files, in any layout that `open_dataset` reads.
        out: a new folder, or one in which the same call was interrupted.
        shard_bytes: about how large each tar becomes; never larger, unless one image is, or resizing.
        resize_px: shorten a longer short side to this many pixels, as JPEG; None copies every file.
        quality: JPEG quality of images that are resized, 1..100.
        workers: shards written at once, >= 1.
    Returns:
        Counts.
    Raises:
        UserError: a source or a folder that cannot be used, or an image that cannot be read.
        SaveError: a full disk.
    """
    source, out = Path(source), Path(out)
    _check_options(shard_bytes, resize_px, quality, workers)
    datasets = _open_source(source, out)
    check_writable(out, "name another folder")
    splits = tuple(dataset.split for dataset in datasets)
    scale = 1.0 if resize_px is None else resized_share(datasets[0], resize_px, quality)
    sizes = [sizes_of(dataset) for dataset in datasets]
    settings = _Settings(resize_px, quality, plan_hash(datasets, sizes, shard_bytes, resize_px, quality))
    plan = [
        _Shard(dataset, out / dataset.split / f"shard-{number:06d}.tar", samples)
        for dataset, own in zip(datasets, sizes, strict=True)
        for number, samples in enumerate(deal_samples(np.ceil(own * scale).astype(np.int64), shard_bytes))
    ]
    with raising(SaveError, f"the shards in {printable(out)} could not be written"):
        check_folder(out, splits, {shard.path: int(shard.samples[0]) for shard in plan}, settings.plan)
        written = _write_all(plan, settings, workers)
        _write_manifest(out, datasets, plan, written, settings)
    return ShardReport(
        num_samples=sum(len(dataset) for dataset in datasets),
        num_shards=len(plan),
        size_bytes=sum(shard.entry.size_bytes for shard in written),
        num_reused=sum(shard.reused for shard in written),
        num_unchanged=sum(shard.num_unchanged for shard in written),
        num_quarantined=sum(dataset.num_quarantined for dataset in datasets),
    )


def _check_options(shard_bytes: int, resize_px: int | None, quality: int, workers: int) -> None:
    if not 1 <= quality <= 100 or workers < 1 or shard_bytes < _MIN_SHARD_BYTES:
        raise UserError(
            f"quality must be 1..100, workers at least 1, shard_bytes at least {_MIN_SHARD_BYTES}: "
            f"not {quality}, {workers}, {shard_bytes}"
        )
    if resize_px is not None and resize_px < 8:
        raise UserError(f"resize_px must be at least 8, not {resize_px}")


def _open_source(source: Path, out: Path) -> list[Dataset]:
    splits = splits_of(source)
    datasets = [open_dataset(source, split) for split in splits]
    for dataset in datasets:
        log_passed_over(dataset.split, dataset.passed_over)
    if any(dataset.reader is not None for dataset in datasets):
        raise UserError(f"{printable(source)} holds tar shards already: give the folder of files")
    resolved, folders = out.resolve(), [source / dataset.folder for dataset in datasets]
    above = (resolved, *resolved.parents)
    if is_same_place(out, source) or any(is_same_place(one, split) for one in above for split in folders):
        raise UserError(f"{printable(out)} lies in the data itself: give another folder for the shards")
    return datasets


def _write_all(plan: list[_Shard], settings: _Settings, workers: int) -> list[_Written]:
    written = []
    total = sum(len(shard.samples) for shard in plan)
    with ThreadPoolExecutor(workers) as pool, show_progress("write shards", total) as progress:
        results = pool.map(partial(_write_shard, settings=settings), plan)
        for shard, result in zip(plan, results, strict=True):  # an error cancels what has not begun
            written.append(result)
            progress.advance(len(shard.samples), shard.path.name)
    return written


def _write_shard(shard: _Shard, settings: _Settings) -> _Written:
    """Write one shard and then its index, each whole or absent; a shard with an index is finished."""
    if (finished := _finished(shard, settings.plan)) is not None:
        return _Written(finished, reused=True)
    dataset, path = shard.dataset, shard.path
    path.parent.mkdir(parents=True, exist_ok=True)
    # a file for each process: two that write the same shards do not mix them up
    temporary = path.with_name(f".{path.name}.{os.getpid()}.writing")
    rows: list[tuple[int | str, ...]] = []
    num_unchanged = 0
    with temporary.open("wb") as file:
        for number in shard.samples.tolist():
            data, extension, unchanged = content_of(dataset, number, settings.resize_px, settings.quality)
            num_unchanged += unchanged
            member, label = f"{number:08d}.{extension}", int(dataset.labels[number])
            place = (member, file.tell() + BLOCK, len(data))
            rows.append((number, dataset.paths[number], *place, label, *map(int, look_at(data))))
            file.write(member_bytes(member, data))
            file.write(member_bytes(f"{number:08d}.cls", str(label).encode()))
        file.write(bytes(2 * BLOCK))
        size_bytes = file.tell()
    fsync_path(temporary)
    index = make_index(rows, size_bytes=size_bytes, plan=settings.plan, sha256=sha256_of(temporary))
    temporary.replace(path)
    write_atomic(index_path(path), encode_index(index))
    return _Written(ShardEntry(path.name, len(rows), size_bytes, index.sha256), num_unchanged)


def _finished(shard: _Shard, plan: str) -> ShardEntry | None:
    """The entry of a shard that an earlier run finished; None if there is none, or an image is newer."""
    try:
        index = read_index(shard.path, plan)
        written_ns = index_path(shard.path).stat().st_mtime_ns
        images = map(shard.dataset.path_at, shard.samples.tolist())
        if any(image.stat().st_mtime_ns >= written_ns for image in images):
            return None
    except (CorruptFileError, OSError):
        return None
    return ShardEntry(shard.path.name, len(shard.samples), index.size_bytes, index.sha256)


def _write_manifest(
    out: Path, datasets: list[Dataset], plan: list[_Shard], written: list[_Written], settings: _Settings
) -> None:
    """Write `dataset.json`, which completes the folder, and remove the files of runs that were killed."""
    splits: dict[str, list[ShardEntry]] = {dataset.split: [] for dataset in datasets}
    for shard, result in zip(plan, written, strict=True):
        splits[shard.dataset.split].append(result.entry)
    manifest = ShardManifest(
        format=FORMAT,
        classes=list(datasets[0].classes),
        labels_text=list(datasets[0].labels_text),
        plan=settings.plan,
        resize_px=settings.resize_px,
        quality=None if settings.resize_px is None else settings.quality,
        splits=splits,
    )
    write_atomic(out / MANIFEST, encode_index(manifest))
    for leftover in (path for split in splits for path in (out / split).glob(".shard-*.writing")):
        leftover.unlink()
