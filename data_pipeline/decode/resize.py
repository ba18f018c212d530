"""Makes crops from decoded images: by `resize_kernel` where that works, else by Pillow, with a log line."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL
from PIL import Image

from data_pipeline.decode.pillow import blank_images, finish_crop
from data_pipeline.transforms.crop import CropParams
from data_pipeline.transforms.sampler import Int

log = logging.getLogger("data_pipeline")

Pixels = npt.NDArray[np.uint8]
_NO_COLORS = np.empty((0, 3, 4), np.float32)
_NO_INDICES = np.empty(0, np.int64)
_MAX_SHRINK = 4096  # twice that, and rounded weights might add up to a pixel above 255, which Pillow clips


class Resizer:
    """Does what `data_pipeline.decode.pillow.finish_crop` does, with the same pixels to the bit.

    The first resizer on a machine compiles the kernel, which takes some seconds. Threads may share one, for
    images that differ.
    """

    def __init__(self) -> None:
        self._compiled = _compiled()

    def finish_into(self, images: Pixels, window: Pixels, crops: CropParams, index: int) -> None:
        """Write one image of a batch.

        Args:
            images: (N, crop, crop, 3) or (N, V, crop, crop, 3), contiguous; the one at `index` is written.
            window: (height, width, 3) RGB, contiguous.
            crops: N crops; their windows are not used.
            index: which of the crops.
        """
        if self._compiled is None or _shrinks_too_much(window.shape[:2], crops):
            images[index] = finish_crop(Image.fromarray(window), crops, index)
            return
        _call(self._compiled, images, window[None], _NO_INDICES, crops, index, index + 1)

    def crop_batch(self, images: Pixels, pixels: Pixels, indices: Int, crops: CropParams) -> None:
        """Write a batch, from images that are decoded already.

        Args:
            images: (N, crop, crop, 3) or (N, V, crop, crop, 3), contiguous.
            pixels: (M, height, width, 3) RGB, contiguous; may be read-only.
            indices: (N) the image in `pixels` that each is of.
            crops: N crops of images of that size, N at least 1.
        """
        windows = crops.windows
        assert len(images) == len(indices) == len(crops)
        assert indices.min() >= 0 and indices.max() < len(pixels) and windows.min() >= 0
        assert ((windows[:, :2] + windows[:, 2:]).max(axis=0) <= pixels.shape[1:3]).all()
        if self._compiled is None or _shrinks_too_much(pixels.shape[1:3], crops):
            for i, (y, x, height, width) in enumerate(windows.tolist()):
                window = Image.fromarray(pixels[indices[i], y : y + height, x : x + width])
                images[i] = finish_crop(window, crops, i)
            return
        _call(self._compiled, images, pixels, indices, crops, 0, len(crops))


def _shrinks_too_much(size: tuple[int, ...], crops: CropParams) -> bool:
    return max(size) > _MAX_SHRINK * crops.crop_px


def _call(
    compiled: Any, images: Pixels, pixels: Pixels, indices: Int, crops: CropParams, first: int, stop: int
) -> None:
    offsets, flips = crops.offsets, crops.flips
    if not crops.views:
        images, offsets, flips = images[:, None], offsets[:, None], flips[:, None]
    colors = _NO_COLORS if crops.colors is None else crops.colors
    compiled(pixels, indices, crops.windows, crops.sizes, offsets, flips, colors, images, first, stop)


@lru_cache(maxsize=1)
def _compiled() -> Any:
    """The kernel; None where it cannot be compiled, or does not give Pillow's pixels."""
    try:
        from data_pipeline.decode.resize_kernel import compile_crop_batch

        compiled = compile_crop_batch()
    except Exception as error:  # Numba refuses a NumPy newer than itself, for one
        log.warning("Numba cannot compile the resize (%s): Pillow resizes, more slowly", error)
        return None
    if not _agrees_with_pillow(compiled):
        log.warning(
            "the compiled resize differs from Pillow %s: Pillow resizes, more slowly", PIL.__version__
        )
        return None
    return compiled


def _agrees_with_pillow(compiled: Any) -> bool:
    """Whether it gives the installed Pillow's pixels: resized, tall, mirrored, padded, coloured, views.

    Before version 13, Pillow resized tall windows in another order; where a compiler fuses multiplying and
    adding, its colours may differ.
    """
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (2, 300, 130, 3), np.uint8)
    one = CropParams(
        windows=np.array([(7, 1, 40, 50), (0, 0, 130, 90), (0, 9, 300, 120)]),
        sizes=np.array([(64, 64), (80, 70), (64, 90)]),
        offsets=np.array([(0, 0), (7, 3), (0, 26)]),
        flips=np.array([True, False, True]),
        crop_px=64,
        colors=random.normal(0.4, 0.3, (3, 3, 4)).astype(np.float32),
    )
    two = replace(
        one,
        sizes=np.array([(64, 66), (80, 70), (70, 90)]),
        offsets=np.array([[(0, 0), (0, 2)], [(7, 3), (0, 6)], [(6, 26), (0, 0)]]),
        flips=np.array([[True, False], [False, True], [True, True]]),
    )
    indices = np.array([1, 0, 1])
    padded = replace(one, offsets=np.array([(-8, 0), (20, 14), (-3, 30)]))
    for crops in (one, replace(one, colors=None), two, padded, replace(two, offsets=two.offsets * 3 - 9)):
        images = blank_images(crops)
        _call(compiled, images, pixels, indices, crops, 0, len(crops))
        for i, (y, x, height, width) in enumerate(crops.windows.tolist()):
            window = Image.fromarray(pixels[indices[i], y : y + height, x : x + width])
            if not np.array_equal(images[i], finish_crop(window, crops, i)):
                return False
    return True
