"""Decoded images for a model: what the gate, evaluation and prediction share."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from data_pipeline.common.errors import UserError
from data_pipeline.common.machine import usable_cores
from data_pipeline.loader import make_backend
from data_pipeline.loading.prefetch import Batch, ImageBackend
from data_pipeline.transforms.preprocessing import Preprocessing
from infer.runtime.base import InferenceBackend

log = logging.getLogger("infer")

DecoderName = Literal["auto", "dali", "pillow"]
FEW_IMAGES = 1000
"""DALI takes 0.4 ms of a core less for each, and 0.7 s to start."""


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
    preprocessing: Preprocessing,
    max_batch: int,
    name: DecoderName = "auto",
    device: Literal["cpu", "gpu"] = "cpu",
    threads: int | None = None,
) -> Iterator[ImageBackend]:
    """A decoder; closed afterwards.

    Args:
        preprocessing: the contract.
        max_batch: most images in one batch.
        name: who decodes.
        device: "gpu" leaves the images in the first GPU's memory.
        threads: decoding threads; None for one for each core that this process may use.
    """
    decoder = make_backend(
        name,
        device=device,
        preprocessing=preprocessing,
        max_batch=max_batch,
        num_threads=threads or usable_cores(),
    )
    try:
        yield decoder
    finally:
        decoder.close()


def quick_decoder(name: DecoderName, backend: InferenceBackend, expected: int | None) -> DecoderName:
    """Who decodes so many images soonest: a few are done before DALI has started, and on a CPU look the same.

    Args:
        name: what was asked for; only `auto` is changed.
        backend: the model; on a GPU, DALI decodes there.
        expected: how many there will be; None where that is not known.
    """
    if name != "auto" or expected is None or expected > FEW_IMAGES or decoding_device(backend, name) == "gpu":
        return name
    log.info("decoding by Pillow: %d images take it less time than DALI takes to start", expected)
    return "pillow"


def valid_images(batch: Batch) -> NDArray[np.uint8]:
    """The images of a batch that could be decoded, in order: (n, [V,] crop, crop, 3) in host memory."""
    images_NHWC = np.from_dlpack(batch.images)
    assert images_NHWC.dtype == np.uint8
    return np.ascontiguousarray(images_NHWC if batch.valid.all() else images_NHWC[batch.valid], np.uint8)


def decoding_device(backend: InferenceBackend, name: DecoderName) -> Literal["cpu", "gpu"]:
    """Where to decode for a model: on its GPU where DALI is there to do it, and nowhere else."""
    if backend.device == "cpu" or name == "pillow":
        return "cpu"
    return "gpu" if importlib.util.find_spec("nvidia") and importlib.util.find_spec("nvidia.dali") else "cpu"


def run_valid(backend: InferenceBackend, batch: Batch, size: int) -> NDArray[np.float32]:
    """Probabilities (n, classes) of the n images of a batch that could be decoded, in order.

    Images on a GPU are read there, by address; the failed ones among them are computed and dropped.

    Args:
        backend: the model.
        batch: one with at least one valid image.
        size: most images in one run; of ten crops, each counts.
    """
    if hasattr(batch.images, "__cuda_array_interface__"):
        shape, address = tuple(batch.images.shape()), int(batch.images.data_ptr())
        views = shape[:-3]
        image_bytes, count = int(np.prod(shape[-3:])), int(np.prod(views))
        parts = [
            backend.run_at(address + first * image_bytes, (min(size, count - first), *shape[-3:]))
            for first in range(0, count, size)
        ]
        probabilities = np.concatenate(parts).reshape(*views, -1)[batch.valid]
        return probabilities if len(views) == 1 else mean_of_views(probabilities)
    images = valid_images(batch)
    if images.ndim == 4:
        return backend.run(images)
    flat = images.reshape(-1, *images.shape[2:])
    parts = [backend.run(flat[first : first + size]) for first in range(0, len(flat), size)]
    return mean_of_views(np.concatenate(parts).reshape(*images.shape[:2], -1))


def mean_of_views(probabilities_NVC: NDArray[np.float32]) -> NDArray[np.float32]:
    """The mean over the views of each image: averaging softmax outputs, as the paper's section 6.1 does."""
    mean: NDArray[np.float32] = probabilities_NVC.mean(axis=1)
    return mean


def host_pixels(batch: Batch) -> NDArray[np.uint8]:
    """All images of a batch in host memory, (N, [V,] crop, crop, 3): for people to look at."""
    images = batch.images
    if hasattr(images, "__cuda_array_interface__"):
        images = images.as_cpu()
    return np.asarray(images)
