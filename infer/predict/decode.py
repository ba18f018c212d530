"""Decodes images for a model, and runs it on them. The gate, evaluation and prediction share this.

Shape suffixes: N images, V views of each (ten crops), H W C pixels; NC probabilities.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from contextlib import closing
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from data_pipeline.common.errors import UserError
from data_pipeline.common.machine import usable_cores
from data_pipeline.decode.backend import ImageBackend, make_backend
from data_pipeline.loading.bad_files import Failure, FaultLog
from data_pipeline.loading.batches import Batch
from data_pipeline.transforms.preprocessing import Preprocessing
from infer.runtime.base import InferenceBackend, Outputs

log = logging.getLogger("infer")

DecoderName = Literal["auto", "dali", "pillow"]
FEW_IMAGES = 1000
"""Up to here Pillow is done sooner: DALI saves 0.4 ms of a core per image, and takes 0.7 s to start."""


class SilentFaultLog(FaultLog):
    """Discards failures: prediction reports each as an error row, and reads a file again when asked again."""

    def add(self, failure: Failure, path: os.PathLike[str]) -> None:
        """Discard a failure, and exclude nothing."""


def fit_batch(wanted: int, max_batch: int) -> int:
    """The batch size to use: what is wanted or, with a warning, the most that the model takes.

    Raises:
        UserError: less than 1.
    """
    if wanted < 1:
        raise UserError(f"--batch-size {wanted}: at least 1")
    if wanted > max_batch:
        log.warning("batches of %d instead of %d: the model was exported for no more", max_batch, wanted)
    return min(wanted, max_batch)


def open_decoder(
    preprocessing: Preprocessing,
    max_batch: int,
    name: DecoderName = "auto",
    backend: InferenceBackend | None = None,
    threads: int | None = None,
) -> closing[ImageBackend]:
    """A decoder, as a context that closes it.

    Args:
        preprocessing: the contract.
        max_batch: most images in one batch.
        name: which decoder.
        backend: the model, if images may stay in the memory of its GPU, see `decoding_device`.
        threads: decoding threads; None for one for each core that this process may use.
    """
    device = "cpu" if backend is None else decoding_device(backend, name)
    num_threads = threads or usable_cores()
    return closing(
        make_backend(
            name, device=device, preprocessing=preprocessing, max_batch=max_batch, num_threads=num_threads
        )
    )


def decoding_device(backend: InferenceBackend, name: DecoderName) -> Literal["cpu", "gpu"]:
    """Where to decode for a model: on its GPU if DALI is there to do it, else on the CPU."""
    if backend.device == "cpu" or name == "pillow":
        return "cpu"
    return "gpu" if importlib.util.find_spec("nvidia") and importlib.util.find_spec("nvidia.dali") else "cpu"


def choose_decoder(name: DecoderName, backend: InferenceBackend, expected: int | None) -> DecoderName:
    """The decoder that finishes first: for few images on a CPU it is Pillow, whose pixels are the same.

    Args:
        name: what was asked for; only `auto` is changed.
        backend: the model; on a GPU, DALI decodes there.
        expected: how many images there will be; None if that is not known.
    """
    if name != "auto" or expected is None or expected > FEW_IMAGES or decoding_device(backend, name) == "gpu":
        return name
    log.info("decoding by Pillow: %d images take it less time than DALI takes to start", expected)
    return "pillow"


def valid_images(batch: Batch) -> NDArray[np.uint8]:
    """The images of a batch that could be decoded, in order: (n, [V,] crop, crop, 3) in host memory."""
    images_NHWC = host_pixels(batch)
    assert images_NHWC.dtype == np.uint8
    return np.ascontiguousarray(images_NHWC if batch.valid.all() else images_NHWC[batch.valid], np.uint8)


def host_pixels(batch: Batch) -> NDArray[np.uint8]:
    """All images of a batch, (N, [V,] crop, crop, 3) in host memory; those that failed are black."""
    return np.asarray(batch.images.as_cpu() if _is_on_gpu(batch) else batch.images)


def run_valid(backend: InferenceBackend, batch: Batch, size: int, *, features: bool = False) -> Outputs:
    """The outputs for the n images of a batch that could be decoded, in order; (0, 0) if none.

    Of ten views of each image it is the mean of their softmax outputs (Krizhevsky et al. 2012, section 6.1).
    Images on a GPU are read there, by address; those that failed are computed as well, and dropped.

    Args:
        backend: the model.
        batch: decoded images.
        size: most images in one run; each view counts.
        features: whether to give the features, too, of a bundle that has them; of ten views, their mean.
    """
    if not batch.valid.any():
        return Outputs(np.empty((0, 0), np.float32))
    if _is_on_gpu(batch):
        shape, address = tuple(batch.images.shape()), int(batch.images.data_ptr())
        image_bytes = int(np.prod(shape[-3:]))
        found = [
            backend.run_at(address + first * image_bytes, (stop - first, *shape[-3:]), features=features)
            for first, stop in _runs(shape, size)
        ]
    else:
        images = valid_images(batch)
        flat_NHWC = images.reshape(-1, *images.shape[-3:])
        runs = _runs(images.shape, size)
        found = [backend.run(flat_NHWC[first:stop], features=features) for first, stop in runs]
    probabilities = [one.probabilities for one in found]
    given = [one.features for one in found if one.features is not None]
    return Outputs(_join(probabilities, batch), _join(given, batch) if given else None)


def _join(runs: list[NDArray[np.float32]], batch: Batch) -> NDArray[np.float32]:
    """Stack the outputs for the images that could be decoded: (n, length), the mean of an image's views."""
    found = np.concatenate(runs)
    count = len(batch) if _is_on_gpu(batch) else int(batch.valid.sum())
    by_view = found.reshape(count, -1, found.shape[-1])
    if _is_on_gpu(batch):
        by_view = by_view[batch.valid]
    return by_view[:, 0] if by_view.shape[1] == 1 else by_view.mean(axis=1)


def _is_on_gpu(batch: Batch) -> bool:
    return hasattr(batch.images, "__cuda_array_interface__")


def _runs(shape: tuple[int, ...], size: int) -> list[tuple[int, int]]:
    """The first image and the end of each run over all images of a batch of this shape."""
    count = int(np.prod(shape[:-3]))
    return [(first, min(first + size, count)) for first in range(0, count, size)]
