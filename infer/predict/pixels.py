"""Arrays and Pillow images as inputs: encoded without loss, and then decoded as files are."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_pipeline.common.errors import ImageError
from data_pipeline.loader import ImageSource

_PNG_MODES = frozenset({"1", "L", "LA", "P", "RGB", "RGBA", "I;16", "I"})
"""Modes that PNG can hold; the others, CMYK among them, become RGB first."""


def from_pixels(pixels: NDArray[Any] | Image.Image, number: int) -> ImageSource:
    """An array or a Pillow image as an input.

    Args:
        pixels: uint8 (height, width, 3) in RGB or (height, width) in gray; or a Pillow image, whose EXIF
            orientation is applied, as it is to a file. Read when its batch is; do not change it before its
            row has come.
        number: its place among the inputs, by which its row is named.
    """
    encode: Callable[..., bytes] = _encode_image if isinstance(pixels, Image.Image) else _encode_array
    return ImageSource(Path(f"<input {number}>"), partial(encode, pixels))


def _encode_array(array: NDArray[Any], max_bytes: int) -> bytes:
    gray = array.ndim == 2
    if array.dtype != np.uint8 or not (gray or (array.ndim == 3 and array.shape[2] == 3)) or 0 in array.shape:
        raise ImageError(
            f"an array of {array.dtype} and shape {array.shape}: expected uint8 (height, width, 3), RGB, "
            "or (height, width), gray"
        )
    return _save(Image.fromarray(array), "BMP", max_bytes)


def _encode_image(image: Image.Image, max_bytes: int) -> bytes:
    try:
        exif = image.info.get("exif") or image.getexif().tobytes()
        in_png = image if image.mode in _PNG_MODES else image.convert("RGB")
        return _save(in_png, "PNG", max_bytes, compress_level=1, exif=exif)
    except (OSError, ValueError, SyntaxError) as error:
        raise ImageError(f"this Pillow image cannot be read: {error}") from error


def _save(image: Image.Image, format: str, max_bytes: int, **options: Any) -> bytes:
    size_bytes = image.width * image.height * max(1, len(image.getbands()))
    if size_bytes > max_bytes:
        raise ImageError(f"{image.width} x {image.height} pixels are above the limit")
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()
