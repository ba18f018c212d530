"""Makes crops from decoded windows: by `resize_kernel` where that works, else by Pillow, with a log line."""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL
from PIL import Image

from data_pipeline.decode.pillow import blank_images, finish_crop
from data_pipeline.transforms.crop import CropParams

log = logging.getLogger("data_pipeline")

Pixels = npt.NDArray[np.uint8]
_NO_COLORS = np.empty((0, 3, 4), np.float32)
_MAX_SHRINK = 4096  # twice that, and rounded weights might add up to a pixel above 255, which Pillow clips


class Resizer:
    """Does what `data_pipeline.decode.pillow.finish_crop` does, with the same pixels to the bit.

    The first resizer on a machine compiles the kernel, which takes some seconds.
    """

    def __init__(self) -> None:
        self._compiled = _compiled()

    def finish_into(self, images: Pixels, window: Pixels, crops: CropParams, index: int) -> None:
        """Write one image of a batch.

        Args:
            images: (N, crop, crop, 3) or (N, V, crop, crop, 3), contiguous; the one at `index` is written.
            window: (height, width, 3) RGB, contiguous.
            crops: N crops.
            index: which of the crops.
        """
        if self._compiled is None or crops.views or max(window.shape) > _MAX_SHRINK * crops.crop_px:
            images[index] = finish_crop(Image.fromarray(window), crops, index)
            return
        _call(self._compiled, images, window, crops, index)


def _call(compiled: Any, images: Pixels, window: Pixels, crops: CropParams, index: int) -> None:
    colors = _NO_COLORS if crops.colors is None else crops.colors
    compiled(window, index, crops.sizes, crops.offsets, crops.flips, colors, images)


@lru_cache(maxsize=1)
def _compiled() -> Any:
    """The kernel; None where it cannot be compiled, or does not give Pillow's pixels."""
    try:
        from data_pipeline.decode.resize_kernel import compile_finish

        compiled = compile_finish()
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
    """Whether the kernel gives the installed Pillow's pixels: enlarged, reduced, tall, mirrored, coloured.

    Before version 13, Pillow resized tall windows in another order; where a compiler fuses multiplying and
    adding, its colours may differ.
    """
    random = np.random.default_rng(0)
    windows = [random.integers(0, 256, (*size, 3), np.uint8) for size in ((40, 50), (130, 90), (300, 120))]
    for colors in (None, random.normal(0.4, 0.3, (len(windows), 3, 4)).astype(np.float32)):
        crops = CropParams(
            windows=np.array([(0, 0, *window.shape[:2]) for window in windows]),
            sizes=np.array([(64, 64), (80, 70), (64, 90)]),
            offsets=np.array([(0, 0), (7, 3), (0, 26)]),
            flips=np.array([True, False, True]),
            crop_px=64,
            colors=colors,
        )
        images = blank_images(crops)
        for index, window in enumerate(windows):
            _call(compiled, images, window, crops, index)
            if not np.array_equal(images[index], finish_crop(Image.fromarray(window), crops, index)):
                return False
    return True
