"""`alexnet data info`: counts, sizes and formats of each split's images, and statistics of the pixels."""

from __future__ import annotations

import logging
import os
from collections import Counter
from contextlib import closing, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path

import msgspec
import numpy as np

from data_pipeline.common.console import show_progress
from data_pipeline.common.errors import UserError
from data_pipeline.common.image_kind import KIND_NAMES, kind_of
from data_pipeline.common.machine import usable_cores
from data_pipeline.common.text import printable
from data_pipeline.common.workers import map_ahead
from data_pipeline.datasets.dataset import Dataset
from data_pipeline.datasets.open import open_dataset, splits_of
from data_pipeline.decode.header import read_header
from data_pipeline.decode.pillow import decode_rgb
from data_pipeline.inspect.pixel_stats import PixelStatistics, PixelSums
from data_pipeline.loading.scan import MAX_PIXELS, Chunk, make_chunks
from data_pipeline.transforms.sampler import Int, permutation_at

log = logging.getLogger("data_pipeline")

_NAMED = 5
"""Unreadable files of a split that are named; `alexnet data verify` lists all."""


class ClassInfo(msgspec.Struct, frozen=True, kw_only=True):
    """One class: its number, its name in the data, its name for people, and its images a split."""

    id: int
    name: str
    label: str
    counts: dict[str, int]


class Extremes(msgspec.Struct, frozen=True, kw_only=True):
    """Images a class: the fewest, the most, and the mean."""

    min: int
    max: int
    mean: float


class Spread(msgspec.Struct, frozen=True, kw_only=True):
    """Percentiles of the widths or heights of upright images, in pixels."""

    min: int
    p5: int
    median: int
    p95: int
    max: int


class SplitInfo(msgspec.Struct, frozen=True, kw_only=True):
    """One split.

    Attributes:
        num_samples: images, without those that the exclude list names.
        num_quarantined: images that the exclude list names.
        num_empty_classes: classes without an image in this split.
        per_class: images a class.
        size_bytes: of all images, encoded.
        num_examined: images whose format and size were read; all, unless a sample was asked for.
        sampled: whether a sample was asked for, and is smaller than the split.
        num_unreadable: of those examined.
        formats: number of images of each, by content, not by name.
        width: of the images; None where none could be read.
        height: the same.
        num_sizes: number of different pairs of width and height.
        common_sizes: the most frequent, as (width, height, images).
        passed_over: files that were taken for no images, by lower-case suffix.
        num_loose: images beside the class folders, which are not read either.
    """

    num_samples: int
    num_quarantined: int
    num_empty_classes: int
    per_class: Extremes
    size_bytes: int
    num_examined: int
    sampled: bool
    num_unreadable: int
    formats: dict[str, int]
    width: Spread | None
    height: Spread | None
    num_sizes: int
    common_sizes: tuple[tuple[int, int, int], ...]
    passed_over: dict[str, int]
    num_loose: int


class Info(msgspec.Struct, frozen=True, kw_only=True):
    """A data folder.

    Attributes:
        stored: "files" or "tar shards".
        sample: how many images of each split were to be examined; None for all.
        pixels: of the training split, or of those of its images that were examined; None without any.
    """

    root: str
    stored: str
    sample: int | None
    splits: dict[str, SplitInfo]
    classes: tuple[ClassInfo, ...]
    pixels: PixelStatistics | None


def collect_info(
    root: Path, *, sample: int | None = None, workers: int | None = None
) -> tuple[Info, list[Dataset]]:
    """Examine every image of a data folder: training images are decoded, of others the header is read.

    Args:
        root: the data folder, in any layout that `open_dataset` reads; its exclude list is applied.
        sample: examine only so many images of each split, the same ones each time; None for all.
        workers: processes; None for one on each core.
    Returns:
        The findings, and the opened splits.
    Raises:
        UserError, CorruptFileError: as `open_dataset`.
        WorkerError: a worker was killed.
    """
    root, workers = Path(root), usable_cores() if workers is None else workers
    for name, value in (("--workers", workers), ("--sample", sample)):
        if value is not None and value < 1:
            raise UserError(f"{name} {value}: at least 1")
    datasets = [open_dataset(root, split) for split in splits_of(root)]
    found = {dataset.split: _examine_split(dataset, sample, workers) for dataset in datasets}
    train = found["train"].pixels if "train" in found else PixelSums()
    counts = {d.split: np.bincount(d.labels, minlength=len(d.classes)) for d in datasets}
    info = Info(
        root=printable(root),
        stored="files" if datasets[0].reader is None else "tar shards",
        sample=sample,
        splits={d.split: _split_info(d, counts[d.split], found[d.split]) for d in datasets},
        classes=tuple(
            ClassInfo(
                id=number,
                name=printable(name),
                label=printable(label),
                counts={split: int(count[number]) for split, count in counts.items()},
            )
            for number, (name, label) in enumerate(
                zip(datasets[0].classes, datasets[0].class_labels, strict=True)
            )
        ),
        pixels=train.statistics() if train.num_images else None,
    )
    return info, datasets


@dataclass
class _Found:
    """Counts of some samples: `sizes` of (height, width); `unreadable` has reasons, by place in the split."""

    num_samples: int = 0
    formats: Counter[str] = field(default_factory=Counter)
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    pixels: PixelSums = field(default_factory=PixelSums)
    unreadable: dict[int, str] = field(default_factory=dict)

    def add(self, _: int, data: bytes, *, decode: bool) -> None:
        size = read_header(data, MAX_PIXELS)
        if decode:
            self.pixels.add(np.asarray(decode_rgb(data)))
        self.sizes[size] += 1
        self.formats[KIND_NAMES[kind_of(data)]] += 1

    def merge(self, other: _Found) -> None:
        self.num_samples += other.num_samples
        self.formats += other.formats
        self.sizes += other.sizes
        self.pixels.merge(other.pixels)
        self.unreadable |= other.unreadable


def _examine_chunk(chunk: Chunk, *, decode: bool) -> _Found:
    found = _Found(num_samples=len(chunk.places))
    found.unreadable = chunk.examine(partial(found.add, decode=decode))
    return found


def _examine_split(dataset: Dataset, sample: int | None, workers: int) -> _Found:
    found, places = _Found(), np.arange(len(dataset), dtype=np.int64)
    if sample is not None:  # the first of a fixed permutation
        places = np.sort(permutation_at(0, 0, len(dataset))[:sample])
    examine = partial(_examine_chunk, decode=dataset.split == "train")
    with (
        show_progress(f"examine {dataset.split}", len(places)) as progress,
        closing(map_ahead(examine, make_chunks(dataset, places), workers)) as results,
    ):
        for part in results:
            found.merge(part)
            progress.advance(part.num_samples)
    for place, reason in islice(found.unreadable.items(), _NAMED):
        log.warning("%s: %s", printable(dataset.path_at(place)), reason)
    if len(found.unreadable) > _NAMED:
        log.warning("and %d more images of %s", len(found.unreadable) - _NAMED, dataset.split)
    return found


def _split_info(dataset: Dataset, counts: Int, found: _Found) -> SplitInfo:
    common = sorted(found.sizes.items(), key=lambda item: (-item[1], item[0]))[:5]
    return SplitInfo(
        num_samples=len(dataset),
        num_quarantined=dataset.num_quarantined,
        num_empty_classes=int((counts == 0).sum()),
        per_class=Extremes(min=int(counts.min()), max=int(counts.max()), mean=float(counts.mean())),
        size_bytes=_size_bytes(dataset),
        num_examined=found.num_samples,
        sampled=found.num_samples < len(dataset),
        num_unreadable=len(found.unreadable),
        formats=dict(found.formats.most_common()),
        width=_spread(found.sizes, axis=1),
        height=_spread(found.sizes, axis=0),
        num_sizes=len(found.sizes),
        common_sizes=tuple((width, height, count) for (height, width), count in common),
        passed_over=dataset.passed_over.by_count,
        num_loose=dataset.passed_over.num_loose,
    )


def _spread(sizes: Counter[tuple[int, int]], axis: int) -> Spread | None:
    if not sizes:
        return None
    values = np.repeat([size[axis] for size in sizes], list(sizes.values()))
    at = np.quantile(values, (0, 0.05, 0.5, 0.95, 1), method="inverted_cdf").tolist()
    return Spread(min=at[0], p5=at[1], median=at[2], p95=at[3], max=at[4])


def _size_bytes(dataset: Dataset) -> int:
    """The bytes of all images, without reading them; a missing file counts as empty."""
    if dataset.reader is not None:
        return int(dataset.reader.sizes.sum())
    total = 0
    for path in dataset.paths:
        with suppress(OSError):
            total += os.stat(f"{dataset.root}/{dataset.folder}/{path}").st_size  # noqa: PTH116 - half the cost
    return total
