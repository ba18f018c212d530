"""Image files to rows of the most probable classes: one row for each input, in order, as batches finish."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import UserError
from data_pipeline.faults import Failure, FaultLog, printable
from data_pipeline.loader import Batch, predict_batches
from infer.backends import InferenceBackend
from infer.bundle import Bundle
from infer.images import DecoderName, fit_batch, open_decoder, valid_images

DEFAULT_BATCH = 32
DEFAULT_TOP = 5


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


def predict(
    paths: Iterable[Path],
    bundle: Bundle,
    backend: InferenceBackend,
    *,
    top: int | None = None,
    batch_size: int = DEFAULT_BATCH,
    decoder: DecoderName = "auto",
) -> Iterator[Row]:
    r"""Predict files in batches, read and decoded ahead; memory does not grow with their number.

    A path that is not UTF-8 is shown with `\xNN` for its odd bytes, so that a row is always valid JSON.

    Args:
        paths: image files, as `data_pipeline.index.find_images` finds them.
        bundle: a verified bundle.
        backend: it, loaded; the caller closes it.
        top: classes a row; None for five, or all where the model has fewer.
        batch_size: images a batch; lowered, with a warning, to what the bundle takes.
        decoder: who decodes.
    Returns:
        The rows, one for each path, in their order.
    Raises:
        UserError: `top` or `batch_size` below 1, or `top` above the number of classes.
    """
    classes = bundle.manifest.classes
    if top is not None and not 1 <= top <= len(classes):
        raise UserError(f"--top {top}: the model has {len(classes)} classes; use 1 to {len(classes)}")
    k = top or min(DEFAULT_TOP, len(classes))
    size = fit_batch(batch_size, backend.max_batch)
    return _rows(paths, bundle, backend, k, size, decoder)


class _RowsTellThem(FaultLog):
    """Says and keeps nothing: in prediction every bad file has its own row."""

    def add(self, failure: Failure) -> None:
        pass

    def set_aside(self, path: os.PathLike[str], reason: str) -> None:
        pass


def _rows(
    paths: Iterable[Path], bundle: Bundle, backend: InferenceBackend, k: int, size: int, decoder: DecoderName
) -> Iterator[Row]:
    """The generator behind `predict`, apart so that wrong arguments are told at once."""
    preprocessing, labels = bundle.manifest.preprocessing, bundle.manifest.class_labels
    with open_decoder(preprocessing, size, decoder) as source:
        batches = predict_batches(paths, source, preprocessing, micro_batch=size, faults=_RowsTellThem())
        for batch in batches:
            yield from _rows_of(batch, backend, labels, k)


def _rows_of(batch: Batch, backend: InferenceBackend, labels: tuple[str, ...], k: int) -> Iterator[Row]:
    ok: Iterator[tuple[Prediction, ...]] = iter(())
    if batch.valid.any():
        ok = iter(top_k(backend.run(valid_images(batch)), labels, k))
    failures = iter(batch.failures)
    for path, valid in zip(batch.paths, batch.valid, strict=True):
        if valid:
            yield OkRow(path=printable(path), predictions=next(ok))
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
