"""Reads the header of an encoded image: its kind, size and orientation, without decoding it."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache

from PIL import Image, ImageFile

from data_pipeline.common.errors import ImageError
from data_pipeline.common.image_kind import HEAD_BYTES, KIND_NAMES, Kind, is_image_head, kind_of

TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""Pillow's operation that turns an image upright, by EXIF orientation; 1 needs none."""

_ORIENTATION = 0x0112
_SIDEWAYS = (5, 6, 7, 8)
_NEVER_IN_TEXT = frozenset(range(1, 32)) - frozenset(b"\t\n\r\x1b")


def read_header(encoded: bytes, max_pixels: int) -> tuple[int, int]:
    """Read the height and width of the upright image, from its header alone.

    Args:
        encoded: the file's bytes.
        max_pixels: most pixels that may be decoded later.
    Returns:
        height, width, in pixels, as they are after the EXIF orientation is applied.
    Raises:
        ImageError: not an image, or more pixels than allowed.
    """
    height, width, orientation = look_at_header(encoded)
    if width * height > max_pixels:
        stored = f"{height} x {width}" if orientation in _SIDEWAYS else f"{width} x {height}"
        raise ImageError(f"{stored} pixels are above the limit of {max_pixels}")
    return height, width


def look_at_header(encoded: bytes) -> tuple[int, int, int]:
    """Read the size of the upright image, and its orientation.

    Args:
        encoded: the file's bytes.
    Returns:
        height, width, in pixels, as they are after the EXIF orientation is applied; the orientation, 1..8.
    Raises:
        ImageError: not an image.
    """
    image = open_image(encoded)
    width, height = image.size
    if width < 1 or height < 1:
        raise ImageError(f"an image of {width} x {height} pixels")
    orientation = orientation_of(image)
    return (width, height, orientation) if orientation in _SIDEWAYS else (height, width, orientation)


@lru_cache(maxsize=1)
def image_readers() -> dict[Kind, Callable[[io.BytesIO], ImageFile.ImageFile]]:
    """The reader of each format that we accept; the first call imports Pillow's plugins.

    Not `Image.open`: it tries every plugin, runs Ghostscript for PostScript, and its pixel limit is a global.
    """
    from PIL import (
        BmpImagePlugin,
        GifImagePlugin,
        JpegImagePlugin,
        PngImagePlugin,
        TgaImagePlugin,
        TiffImagePlugin,
        WebPImagePlugin,
    )

    from data_pipeline.decode.checked_readers import open_avif, open_icon, open_jpeg2000, open_pnm

    return {
        Kind.JPEG: JpegImagePlugin.JpegImageFile,
        Kind.PNG: PngImagePlugin.PngImageFile,
        Kind.BMP: BmpImagePlugin.BmpImageFile,
        Kind.WEBP: WebPImagePlugin.WebPImageFile,
        Kind.TIFF: TiffImagePlugin.TiffImageFile,
        Kind.GIF: GifImagePlugin.GifImageFile,
        Kind.PNM: open_pnm,
        Kind.AVIF: open_avif,
        Kind.JPEG2000: open_jpeg2000,
        Kind.ICO: open_icon,
        Kind.TGA: TgaImagePlugin.TgaImageFile,
    }


def is_image_start(head: bytes) -> bool:
    """Whether data begins as an image does, and not as text: a path may begin with BM or RIFF, too.

    Args:
        head: the first `HEAD_BYTES` or more; all, if there are less.
    """
    head = head[:HEAD_BYTES]
    if not is_image_head(head):
        return False
    return head[0] >= 0x80 or b"\0\0" in head or any(byte in _NEVER_IN_TEXT for byte in head)


def open_image(encoded: bytes) -> ImageFile.ImageFile:
    if not encoded:
        raise ImageError("empty file")
    kind = kind_of(encoded)
    if kind is Kind.UNREADABLE:
        known = ", ".join(KIND_NAMES[kind] for kind in image_readers())
        raise ImageError(f"not an image of a known format ({known})")
    with reader_errors(kind):
        return image_readers()[kind](io.BytesIO(encoded))


def orientation_of(image: ImageFile.ImageFile) -> int:
    """EXIF orientation, 1..8, from the metadata before the pixels only, so that nothing is decoded."""
    if image.format == "TIFF":
        return 1  # Pillow's TIFF reader turns the image itself
    exif = image.info.get("exif")
    if not exif:
        return 1
    parsed = Image.Exif()
    try:
        parsed.load(exif)
        value = parsed.get(_ORIENTATION, 1)
    except Exception:  # broken metadata is no reason to lose the pixels
        return 1
    return value if value in TURNS else 1


@contextmanager
def reader_errors(kind: Kind) -> Iterator[None]:
    """Turn whatever Pillow's reader raises (OSError, SyntaxError, struct.error, ...) into an `ImageError`."""
    try:
        yield
    except ImageError:
        raise
    except Exception as error:
        text = str(error).strip().split("\n")[0] or type(error).__name__
        short = "truncated" in text.lower() or "not enough image data" in text
        raise ImageError(f"{'truncated' if short else 'damaged'} {KIND_NAMES[kind]}: {text}") from error
