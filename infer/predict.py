"""Images to rows of the most probable classes: one row for each input, in order, as batches finish."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import UserError
from data_pipeline.faults import Failure, FaultLog, printable
from data_pipeline.loader import Batch, Readable, predict_batches
from infer.backends import InferenceBackend
from infer.bundle import Bundle
from infer.images import DecoderName, decoding_device, fit_batch, host_pixels, open_decoder, run_valid

DEFAULT_BATCH = 32
DEFAULT_TOP = 5
CENTRE_VIEW = 4
"""Which of the ten views is the centre, not mirrored."""

Item = Path | Readable
"""What a row is made from: a file, or an image that lies elsewhere."""


class Prediction(msgspec.Struct, frozen=True, kw_only=True):
    """One class of one image."""

    class_id: int
    label: str
    probability: Annotated[float, msgspec.Meta(ge=0, le=1)]


class OkRow(msgspec.Struct, frozen=True, kw_only=True):
    """An image that was predicted; the most probable class comes first."""

    path: str
    status: Literal["ok"] = "ok"
    predictions: tuple[Prediction, ...]


class ErrorRow(msgspec.Struct, frozen=True, kw_only=True):
    """An input that is not an image that can be read, and the reason."""

    path: str
    status: Literal["error"] = "error"
    error: str


Row = OkRow | ErrorRow


class SeenRow(NamedTuple):
    """A row, and the pixels that it was made from: (crop, crop, 3) uint8 RGB, or None for an error."""

    row: Row
    pixels: NDArray[np.uint8] | None


def predict(
    inputs: Iterable[Item],
    bundle: Bundle,
    backend: InferenceBackend,
    *,
    top: int | None = None,
    batch_size: int = DEFAULT_BATCH,
    decoder: DecoderName = "auto",
    min_probability: float = 0.0,
    ten_crop: bool = False,
) -> Iterator[Row]:
    r"""Predict images in batches, read and decoded ahead; memory does not grow with their number.

    A path that is not UTF-8 is shown with `\xNN` for its odd bytes, so that a row is always valid JSON.

    Args:
        inputs: image files, and what `infer.inputs.find_inputs` finds.
        bundle: a verified bundle.
        backend: it, loaded; the caller closes it.
        top: classes a row; None for five, or all where the model has fewer.
        batch_size: images a batch; lowered, with a warning, to what the bundle takes.
        decoder: who decodes.
        min_probability: classes below are left out of a row, which may leave none.
        ten_crop: average the softmax of the paper's ten views of each image.
    Returns:
        The rows, one for each input, in their order.
    Raises:
        UserError: `top` or `batch_size` below 1, `top` above the number of classes, or `min_probability`
            outside 0..1.
    """
    make = _RowMaker(bundle, backend, check_top(bundle, top), min_probability)
    batches = _batches(inputs, bundle, backend, batch_size, decoder, ten_crop)
    return (row for batch, size in batches for row in make.rows(batch, size))


def predict_seen(
    inputs: Iterable[Item],
    bundle: Bundle,
    backend: InferenceBackend,
    *,
    top: int | None = None,
    batch_size: int = DEFAULT_BATCH,
    decoder: DecoderName = "auto",
    min_probability: float = 0.0,
    ten_crop: bool = False,
) -> Iterator[SeenRow]:
    """As `predict`, with what the model saw of each image; of ten crops, the one in the centre."""
    make = _RowMaker(bundle, backend, check_top(bundle, top), min_probability)
    batches = _batches(inputs, bundle, backend, batch_size, decoder, ten_crop)

    def seen() -> Iterator[SeenRow]:
        for batch, size in batches:
            pixels = host_pixels(batch)
            centre = pixels[:, CENTRE_VIEW] if ten_crop else pixels
            for place, row in enumerate(make.rows(batch, size)):
                yield SeenRow(row, centre[place] if isinstance(row, OkRow) else None)

    return seen()


def check_top(bundle: Bundle, top: int | None) -> int:
    """Classes a row: what was asked for, or five, or all where the model has fewer.

    Raises:
        UserError: below 1 or above the number of classes.
    """
    count = len(bundle.manifest.classes)
    if top is not None and not 1 <= top <= count:
        raise UserError(f"--top {top}: the model has {count} classes; use 1 to {count}")
    return top or min(DEFAULT_TOP, count)


def path_of(item: Item) -> Path:
    """How the row of an input names it."""
    return item.path if isinstance(item, Readable) else item


class _RowsTellThem(FaultLog):
    """Says and keeps nothing: in prediction every bad file has its own row."""

    def add(self, failure: Failure) -> None:
        pass

    def set_aside(self, path: os.PathLike[str], reason: str) -> None:
        pass


def _batches(
    inputs: Iterable[Item],
    bundle: Bundle,
    backend: InferenceBackend,
    batch_size: int,
    decoder: DecoderName,
    ten_crop: bool,
) -> Iterator[tuple[Batch, int]]:
    """Decoded batches and their largest size; wrong arguments are told at once."""
    size, preprocessing = fit_batch(batch_size, backend.max_batch), bundle.manifest.preprocessing

    def generate() -> Iterator[tuple[Batch, int]]:
        with open_decoder(preprocessing, size, decoder, decoding_device(backend, decoder)) as source:
            faults = _RowsTellThem()
            batches = predict_batches(
                inputs, source, preprocessing, micro_batch=size, ten_crop=ten_crop, faults=faults
            )
            with closing(batches):
                yield from ((batch, size) for batch in batches)

    return generate()


class _RowMaker:
    """Batches to rows."""

    def __init__(self, bundle: Bundle, backend: InferenceBackend, top: int, min_probability: float) -> None:
        if not 0 <= min_probability <= 1:
            raise UserError(f"--min-probability {min_probability}: 0 to 1")
        self._labels, self._backend = bundle.manifest.class_labels, backend
        self._top, self._least = top, min_probability

    def rows(self, batch: Batch, size: int) -> Iterator[Row]:
        """A row for each image of a batch, in order."""
        ok: Iterator[tuple[Prediction, ...]] = iter(())
        if batch.valid.any():
            ok = iter(top_k(run_valid(self._backend, batch, size), self._labels, self._top))
        failures = iter(batch.failures)
        for path, valid in zip(batch.paths, batch.valid, strict=True):
            if valid:
                found = tuple(p for p in next(ok) if p.probability >= self._least)
                yield OkRow(path=printable(path), predictions=found)
            else:
                yield ErrorRow(path=printable(path), error=next(failures).reason)


def top_k(
    probabilities_NC: NDArray[np.float32], labels: tuple[str, ...], k: int
) -> list[tuple[Prediction, ...]]:
    """The `k` most probable classes of each image, the best first; of equals, the lower class first.

    >>> top_k(np.array([[0.25, 0.75]], np.float32), ("cat", "dog"), 1)
    [(Prediction(class_id=1, label='dog', probability=0.75),)]
    """
    ranked_NK = np.argsort(-probabilities_NC, axis=1, kind="stable")[:, :k]
    return [
        tuple(
            Prediction(class_id=int(c), label=printable(labels[c]), probability=min(float(row_C[c]), 1.0))
            for c in ranked_K
        )
        for row_C, ranked_K in zip(probabilities_NC, ranked_NK, strict=True)
    ]
