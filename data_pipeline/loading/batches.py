"""Batches of images, and requests for them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_pipeline.common.text import printable
from data_pipeline.loading.bad_files import Failure
from data_pipeline.loading.feeds import CropFn
from data_pipeline.loading.readers import Samples
from data_pipeline.transforms.mix import MixParams
from data_pipeline.transforms.sampler import Int
from data_pipeline.transforms.trivial import TrivialParams


@dataclass(frozen=True, eq=False)
class Batch:
    """Decoded samples, in order. A sample that failed keeps its place: zeros, and `valid` False.

    `trivial`, `erase` and `mix` are for the training step, in this order: the images are without them.

    Attributes:
        images: (N, crop, crop, 3) uint8 RGB, or (N, 10, crop, crop, 3) for ten crops; any object with
            `__dlpack__`, on the backend's device.
        labels: (N) int64; -1 in prediction.
        valid: (N) bool, which samples were decoded.
        indices: (N) int64, which sample of the dataset (prediction: which of the paths).
        positions: (N) int64, place in the epoch's order (evaluation, prediction: as `indices`).
        paths: (N) the files; each path is made when it is asked for.
        failures: one for each sample that is not valid, in order.
        step: global step in training; else the number of the batch.
        last: whether this is the last micro-batch of its step.
        trivial: which operation changes each image; None for none at all.
        erase: (N, 4) the box of each image that is erased, see `erase_boxes_at`; None for none at all.
        mix: how to mix images and labels, without the samples that failed; None for not at all.
    """

    images: Any
    labels: Int
    valid: npt.NDArray[np.bool_]
    indices: Int
    positions: Int
    paths: Sequence[Path]
    failures: tuple[Failure, ...]
    step: int
    last: bool
    trivial: TrivialParams | None = None
    erase: Int | None = None
    mix: MixParams | None = None

    def __len__(self) -> int:
        return len(self.labels)


def group_by_step(batches: Iterator[Batch]) -> Iterator[list[Batch]]:
    """Yield the micro-batches of each step as soon as its last one is there."""
    gathered: list[Batch] = []
    for batch in batches:
        gathered.append(batch)
        if batch.last:
            yield gathered
            gathered = []


@dataclass(frozen=True, eq=False)
class BatchRequest:
    """The samples of one batch, and how they are cropped. See `Batch` for the fields of the same name.

    Attributes:
        samples: has the images of the `indices`.
        crop_fn: the crops for the upright sizes, (N, 2), of the N images.
    """

    samples: Samples
    labels: Int
    indices: Int
    positions: Int
    step: int
    last: bool
    crop_fn: CropFn
    trivial: TrivialParams | None = None
    erase: Int | None = None
    mix: MixParams | None = None


class SamplePaths(Sequence[Path]):
    """The paths of some samples, made as they are asked for: a training step needs none.

    Args:
        samples: the samples.
        indices: (N) which of them.
    """

    def __init__(self, samples: Samples, indices: Int) -> None:
        self._samples, self._indices = samples, indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, place: int) -> Path:  # type: ignore[override]  # nobody asks for a slice
        return self._samples.path_at(int(self._indices[place]))


def make_batch(request: BatchRequest, images: object, reasons: dict[int, str]) -> Batch:
    """Make the batch of a request.

    Args:
        images: as `Batch.images`.
        reasons: why samples failed, by their place in the batch.
    """
    valid = np.ones(len(request.indices), dtype=bool)
    valid[list(reasons)] = False
    paths = SamplePaths(request.samples, request.indices)
    return Batch(
        images=images,
        labels=request.labels,
        valid=valid,
        indices=request.indices,
        positions=request.positions,
        paths=paths,
        failures=tuple(Failure(printable(paths[i]), reasons[i]) for i in sorted(reasons)),
        step=request.step,
        last=request.last,
        trivial=request.trivial,
        erase=request.erase,
        mix=None if request.mix is None else request.mix.drop_invalid(valid),
    )
