"""Writes tar shards: in parallel, resumable, and the same bytes for the same input."""

from __future__ import annotations

import json
import os
import re
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from data_pipeline.common.console import show_progress
from data_pipeline.common.errors import CorruptFileError, SaveError, UserError
from data_pipeline.common.files import fsync_path, sha256_of, write_atomic
from data_pipeline.common.text import printable
from data_pipeline.datasets.dataset import Dataset
from data_pipeline.datasets.open import open_dataset, splits_of
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
    ShardIndex,
    ShardManifest,
    index_path,
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


@dataclass(frozen=True)
class _Settings:
    resize_px: int | None
    quality: int
    plan: str


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
    if not 1 <= quality <= 100 or workers < 1 or shard_bytes < _MIN_SHARD_BYTES:
        raise UserError(
            f"quality must be 1..100, workers at least 1, shard_bytes at least {_MIN_SHARD_BYTES}: "
            f"not {quality}, {workers}, {shard_bytes}"
        )
    if resize_px is not None and resize_px < 8:
        raise UserError(f"resize_px must be at least 8, not {resize_px}")
    splits = splits_of(source)
    datasets = [open_dataset(source, split) for split in splits]
    if any(dataset.reader is not None for dataset in datasets):
        raise UserError(f"{printable(source)} holds tar shards already: give the folder of files")
    resolved, folders = out.resolve(), [source.resolve(), *((source / s).resolve() for s in splits)]
    if resolved == folders[0] or any(folder in (resolved, *resolved.parents) for folder in folders[1:]):
        raise UserError(f"{printable(out)} lies in the data itself: give another folder for the shards")

    scale = 1.0 if resize_px is None else resized_share(datasets[0], resize_px, quality)
    sizes = [sizes_of(dataset) for dataset in datasets]
    settings = _Settings(resize_px, quality, plan_hash(datasets, sizes, shard_bytes, resize_px, quality))
    tasks: list[tuple[Dataset, Path, Int]] = []
    for dataset, own in zip(datasets, sizes, strict=True):
        deals = deal_samples(np.ceil(own * scale).astype(np.int64), shard_bytes)
        folder = out / dataset.split
        tasks += [(dataset, folder / f"shard-{n:06d}.tar", deal) for n, deal in enumerate(deals)]
    try:
        check_folder(out, splits, {shard for _, shard, _ in tasks}, settings.plan)
        made = _write_all(tasks, settings, workers)
        return _finish(out, datasets, tasks, made, settings)
    except OSError as error:
        raise SaveError(f"the shards in {printable(out)} could not be written: {error}") from error


def _write_all(
    tasks: list[tuple[Dataset, Path, Int]], settings: _Settings, workers: int
) -> dict[Path, tuple[ShardEntry, int | None]]:
    """Write the shards; return the entry of each, and its unchanged images, or None if it was reused."""
    made: dict[Path, tuple[ShardEntry, int | None]] = {}
    total = sum(len(deal) for _, _, deal in tasks)
    with ThreadPoolExecutor(workers) as pool, show_progress("write shards", total) as progress:
        futures = {pool.submit(_write_shard, *task, settings): task for task in tasks}
        try:
            for future in as_completed(futures):
                _, shard, deal = futures[future]
                made[shard] = future.result()
                progress.advance(len(deal), shard.name)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return made


def _write_shard(
    dataset: Dataset, shard: Path, deal: Int, settings: _Settings
) -> tuple[ShardEntry, int | None]:
    """Write one shard and then its index, each whole or absent; a shard with an index is finished."""
    done = _finished(dataset, shard, deal, settings.plan)
    if done is not None:
        return done, None
    shard.parent.mkdir(parents=True, exist_ok=True)
    # a file for each process: two that write the same shards do not mix them up
    temporary = shard.with_name(f".{shard.name}.{os.getpid()}.writing")
    members: list[str] = []
    offsets: list[int] = []
    sizes: list[int] = []
    num_unchanged = 0
    with temporary.open("wb") as file:
        for number in deal.tolist():
            data, extension, unchanged = content_of(dataset, number, settings.resize_px, settings.quality)
            num_unchanged += unchanged
            members.append(f"{number:08d}.{extension}")
            offsets.append(file.tell() + BLOCK)
            sizes.append(len(data))
            file.write(member_bytes(members[-1], data))
            file.write(member_bytes(f"{number:08d}.cls", str(int(dataset.labels[number])).encode()))
        file.write(bytes(2 * BLOCK))
        size_bytes = file.tell()
    fsync_path(temporary)
    index = ShardIndex(
        format=FORMAT,
        plan=settings.plan,
        size_bytes=size_bytes,
        sha256=sha256_of(temporary),
        numbers=deal.tolist(),
        names=[dataset.paths[number] for number in deal.tolist()],
        members=members,
        offsets=offsets,
        sizes=sizes,
        labels=dataset.labels[deal].tolist(),
    )
    temporary.replace(shard)
    write_atomic(index_path(shard), _json(index))
    return ShardEntry(shard.name, len(deal), size_bytes, index.sha256), num_unchanged


def _finished(dataset: Dataset, shard: Path, deal: Int, plan: str) -> ShardEntry | None:
    """The entry of a shard that an earlier run finished; None if there is none, or an image is newer."""
    path = index_path(shard)
    try:
        index = read_index(shard, plan)
        written_ns = path.stat().st_mtime_ns
        if any(dataset.path_at(n).stat().st_mtime_ns >= written_ns for n in deal.tolist()):
            return None
    except (CorruptFileError, OSError):
        return None
    return ShardEntry(shard.name, len(deal), index.size_bytes, index.sha256)


def _finish(
    out: Path,
    datasets: list[Dataset],
    tasks: list[tuple[Dataset, Path, Int]],
    made: dict[Path, tuple[ShardEntry, int | None]],
    settings: _Settings,
) -> ShardReport:
    entries = {d.split: [made[shard][0] for t, shard, _ in tasks if t is d] for d in datasets}
    manifest = ShardManifest(
        format=FORMAT,
        classes=list(datasets[0].classes),
        labels_text=list(datasets[0].labels_text),
        plan=settings.plan,
        resize_px=settings.resize_px,
        quality=None if settings.resize_px is None else settings.quality,
        splits=entries,
    )
    content = _json(manifest)
    path = out / MANIFEST
    if not path.is_file() or path.read_bytes() != content:
        write_atomic(path, content)
    for leftover in out.glob("*/.*.writing"):
        leftover.unlink()
    counts = [unchanged for _, unchanged in made.values()]
    return ShardReport(
        num_samples=sum(len(dataset) for dataset in datasets),
        num_shards=len(made),
        size_bytes=sum(entry.size_bytes for entry, _ in made.values()),
        num_reused=counts.count(None),
        num_unchanged=sum(count or 0 for count in counts),
        num_quarantined=sum(dataset.num_quarantined for dataset in datasets),
    )


def _json(value: ShardManifest | ShardIndex) -> bytes:
    return (json.dumps(msgspec.to_builtins(value), separators=(",", ":")) + "\n").encode("ascii")
