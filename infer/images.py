"""Decoded images for a model: what the gate, evaluation and prediction share."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import UserError
from data_pipeline.loader import Batch, ImageBackend, make_backend
from data_pipeline.preprocessing import Preprocessing
from infer.backends import usable_cores

log = logging.getLogger("infer")

DecoderName = Literal["auto", "dali", "pillow"]


def fit_batch(asked: int, max_batch: int) -> int:
    """The batch to send: what was asked for, or, with a warning, the most that the model takes.

    Raises:
        UserError: less than 1.
    """
    if asked < 1:
        raise UserError(f"--batch-size {asked}: at least 1")
    if asked > max_batch:
        log.warning("batches of %d instead of %d: the model was exported for no more", max_batch, asked)
    return min(asked, max_batch)


@contextmanager
def open_decoder(
    preprocessing: Preprocessing, max_batch: int, name: DecoderName = "auto"
) -> Iterator[ImageBackend]:
    """A decoder into host memory, on as many threads as this process may use cores; closed afterwards."""
    decoder = make_backend(
        name, device="cpu", preprocessing=preprocessing, max_batch=max_batch, num_threads=usable_cores()
    )
    try:
        yield decoder
    finally:
        decoder.close()


def valid_images(batch: Batch) -> NDArray[np.uint8]:
    """The images of a batch that could be decoded, in order: (n, [V,] crop, crop, 3) in host memory."""
    images_NHWC = np.from_dlpack(batch.images)
    assert images_NHWC.dtype == np.uint8
    return np.ascontiguousarray(images_NHWC if batch.valid.all() else images_NHWC[batch.valid], np.uint8)
