"""Images to rows of the most probable classes: one row for each input, in order, as batches finish."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from data_pipeline.common.errors import UserError
from data_pipeline.common.text import printable
from data_pipeline.loader import ImageSource
from data_pipeline.loading.prefetch import Batch
from infer.bundle.load import Bundle
from infer.predict.decode import DecoderName, host_pixels, run_valid
from infer.predict.decoding import Decoding
from infer.runtime.base import InferenceBackend

DEFAULT_BATCH = 32
DEFAULT_TOP = 5
CENTRE_VIEW = 4
"""Which of the ten views is the centre, not mirrored."""

Item = Path | ImageSource
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
        inputs: image files, and what `infer.predict.inputs.find_inputs` finds.
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
    make = RowMaker(bundle, backend, top=top, min_probability=min_probability, ten_crop=ten_crop)
    decoding = Decoding(
        bundle.manifest.preprocessing, backend, name=decoder, batch_size=batch_size, ten_crop=ten_crop
    )

    def rows() -> Iterator[Row]:
        with closing(decoding):
            yield from make.rows(inputs, decoding)

    return rows()


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
    return item.path if isinstance(item, ImageSource) else item


class RowMaker:
    """Inputs to rows, by one model.

    Args:
        bundle: a verified bundle.
        backend: it, loaded.
        top, min_probability, ten_crop: see `predict`.
    Raises:
        UserError: see `predict`.
    """

    def __init__(
        self,
        bundle: Bundle,
        backend: InferenceBackend,
        *,
        top: int | None,
        min_probability: float,
        ten_crop: bool,
    ) -> None:
        self.top = check_top(bundle, top)
        if not 0 <= min_probability <= 1:
            raise UserError(f"--min-probability {min_probability}: 0 to 1")
        self._labels, self._backend = bundle.manifest.class_labels, backend
        self._least, self._ten_crop = min_probability, ten_crop

    def rows(self, inputs: Iterable[Item], decoding: Decoding) -> Iterator[Row]:
        """A row for each input, in order."""
        with closing(decoding.batches(inputs)) as batches:
            for batch in batches:
                yield from self._rows(batch, decoding.size)

    def seen(self, inputs: Iterable[Item], decoding: Decoding) -> Iterator[SeenRow]:
        """As `rows`, with what the model saw of each image; of ten crops, the one in the centre."""
        with closing(decoding.batches(inputs)) as batches:
            for batch in batches:
                pixels = host_pixels(batch)
                centre = pixels[:, CENTRE_VIEW] if self._ten_crop else pixels
                for place, row in enumerate(self._rows(batch, decoding.size)):
                    yield SeenRow(row, centre[place] if isinstance(row, OkRow) else None)

    def _rows(self, batch: Batch, size: int) -> Iterator[Row]:
        ok: Iterator[tuple[Prediction, ...]] = iter(())
        if batch.valid.any():
            ok = iter(top_k(run_valid(self._backend, batch, size), self._labels, self.top))
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
