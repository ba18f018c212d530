"""A batch on its way to a decoder: the encoded images, or where they lie, and how each is cropped.

Files of our own making stand in it for images which a decoder cannot read, or must not decode whole.
Legend: N images.
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from PIL import Image

from data_pipeline.decode.pillow import decode_window, resize_window
from data_pipeline.transforms.crop import CropParams

Bytes = npt.NDArray[np.uint8]

MAX_MEMORY_PATH = 32
"""Bytes that hold the path of any `MemoryFile`, with a zero behind it."""


@dataclass(frozen=True, eq=False)
class FilePaths:
    """Files that the decoder reads by itself.

    Attributes:
        paths: (N, longest + 1) uint8, the paths in the file system's encoding, filled up with zeros.
        lengths: (N) int64, bytes that each file must have; one of another length is not decoded.
    """

    paths: Bytes
    lengths: npt.NDArray[np.int64]

    def replace(self, index: int, path: str, length: int) -> None:
        """Put another file in the place of one; `paths` and `lengths` are changed.

        Args:
            path: no longer than the others, as that of any `MemoryFile`.
        """
        encoded = np.frombuffer(os.fsencode(path), np.uint8)
        assert len(encoded) < self.paths.shape[1]
        self.paths[index] = 0
        self.paths[index, : len(encoded)] = encoded
        self.lengths[index] = length


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


@dataclass(frozen=True, eq=False)
class Feed:
    """N images, all of a kind that the decoder reads: it decodes all of them, or refuses the batch.

    Attributes:
        files: N times the bytes of a file, none of them empty; or the files' paths.
        sizes: (N, 2) int64, the upright sizes for which the crops were computed. A file of another size must
            not be cropped by them.
        crops: N crops.
        temporary: keeps the files of some of the paths until the batch is decoded.
    """

    files: Sequence[Bytes] | FilePaths
    sizes: npt.NDArray[np.int64]
    crops: CropParams
    temporary: tuple[MemoryFile, ...] = ()

    def __len__(self) -> int:
        return len(self.sizes)


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
