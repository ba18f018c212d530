"""Files of our own making that stand for images which a decoder cannot read, or must not decode whole."""

from __future__ import annotations

import io
import os
from functools import lru_cache

from PIL import Image

from data_pipeline.decode.pillow import decode_window, resize_window
from data_pipeline.transforms.crop import CropParams

MAX_MEMORY_PATH = 32
"""Bytes that hold the path of any `MemoryFile`, with a zero behind it."""


def cut_as_bmp(encoded: bytes, crops: CropParams, index: int) -> bytes:
    """Decode one image, cut its window and resize it, as a file that every decoder reads as it is.

    Args: as `decode_one`.
    Returns:
        A BMP of `crops.sizes` pixels.
    Raises:
        ImageError: as `decode_window`.
    """
    return _as_bmp(resize_window(decode_window(encoded, crops, index), crops, index))


@lru_cache(maxsize=1)
def black_pixel() -> bytes:
    """The file that stands for an image that cannot be read."""
    return _as_bmp(Image.new("RGB", (1, 1)))


def _as_bmp(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "BMP")
    return buffer.getvalue()


class MemoryFile:
    """Bytes under a path that this process can open, without a disk; gone with the object.

    Args:
        content: what the file holds.
    """

    def __init__(self, content: bytes) -> None:
        self._descriptor = os.memfd_create("image", os.MFD_CLOEXEC)
        try:
            with os.fdopen(self._descriptor, "wb", closefd=False) as file:
                file.write(content)
        except BaseException:
            os.close(self._descriptor)
            raise
        self.path = f"/proc/self/fd/{self._descriptor}"

    def __del__(self) -> None:
        if hasattr(self, "path"):
            os.close(self._descriptor)
