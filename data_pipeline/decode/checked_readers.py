"""Readers of formats whose own reader in Pillow does not keep our rules.

These are: nothing is decoded while a file is opened, its header alone gives the size, and nothing in a file
makes that slow. A missing codec, and a header that is not sound, are an `ImageError` or an exception of the
reader.
"""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Iterator
from typing import NamedTuple

from PIL import AvifImagePlugin, BmpImagePlugin, ImageFile, Jpeg2KImagePlugin, PngImagePlugin, PpmImagePlugin
from PIL import features as pillow_features

from data_pipeline.common.errors import ImageError
from data_pipeline.common.image_kind import Kind, kind_of

_PNM_HEADER_BYTES = 4096
_GAP = rb"(?:\s|#[^\r\n]*[\r\n])"
_NUMBER = _GAP + rb"+\d+"
_PNM_HEADER = re.compile(rb"P(?:[14]%b%b|[2356]%b%b%b)\s" % ((_NUMBER,) * 5))

_MAX_COMPONENTS = 4
"""Of a JPEG 2000: Pillow shows no more, and each takes four bytes a pixel while it is decoded."""


def open_pnm(stream: io.BytesIO) -> ImageFile.ImageFile:
    """Open a PBM, PGM or PPM. Pillow reads its header byte by byte, however long a comment is."""
    if _PNM_HEADER.match(stream.getvalue()[:_PNM_HEADER_BYTES]) is None:
        raise ImageError(f"damaged PNM: no size and depth in its first {_PNM_HEADER_BYTES} bytes")
    return PpmImagePlugin.PpmImageFile(stream)


def open_avif(stream: io.BytesIO) -> ImageFile.ImageFile:
    """Open an AVIF, if this Pillow can."""
    if not pillow_features.check("avif"):
        raise ImageError("an AVIF image, which this build of Pillow cannot read")
    return AvifImagePlugin.AvifImageFile(stream)


def open_jpeg2000(stream: io.BytesIO) -> ImageFile.ImageFile:
    """Open a JPEG 2000, if this Pillow can, and if container and codestream name one size."""
    if not pillow_features.check("jpg_2000"):
        raise ImageError("a JPEG 2000 image, which this build of Pillow cannot read")
    image = Jpeg2KImagePlugin.Jpeg2KImageFile(stream)
    width, height, components = _siz(stream.getvalue())
    if (width, height) != image.size:
        raise ImageError(
            f"damaged JPEG 2000: its container says {image.width} x {image.height} pixels, "
            f"its codestream {width} x {height}"
        )
    if components > _MAX_COMPONENTS:
        raise ImageError(f"a JPEG 2000 of {components} components: at most {_MAX_COMPONENTS} are read")
    return image


def _siz(data: bytes) -> tuple[int, int, int]:
    """Width, height and number of components by the codestream, which is what the decoder allocates for."""
    begin = 0 if data[:4] == b"\xff\x4f\xff\x51" else next(_codestreams(data), None)
    if begin is None or data[begin : begin + 4] != b"\xff\x4f\xff\x51":
        raise ImageError("damaged JPEG 2000: it holds no codestream")
    right, lower, left, upper = struct.unpack_from(">4I", data, begin + 8)
    (components,) = struct.unpack_from(">H", data, begin + 40)
    return right - left, lower - upper, components


def _codestreams(data: bytes) -> Iterator[int]:
    """Where the content of each box with a codestream begins (ISO/IEC 15444-1, annex I.4)."""
    at = 0
    while at + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        head = 8
        if length == 1:
            (length,), head = struct.unpack_from(">Q", data, at + 8), 16
        if kind == b"jp2c":
            yield at + head
        if length < head:  # 0: to the end of the file
            return
        at += length


class _IconEntry(NamedTuple):
    """A picture in an icon: its area and depth by the directory, and where it begins."""

    area: int
    bits: int
    offset: int


class _IconBitmap(BmpImagePlugin.DibImageFile):
    """A bitmap of an icon: its height counts the mask below the colours as well."""

    def _open(self) -> None:
        super()._open()
        self._size = self.width, self.height // 2
        if self.tile:
            tile = self.tile[0]
            self.tile = [tile._replace(extents=(0, 0, *self.size))]


def open_icon(stream: io.BytesIO) -> ImageFile.ImageFile:
    """Open the largest picture of an icon, of several the deepest. Its mask is dropped, as all transparency.

    Pillow's own reader decodes while it opens, and its limit is a global of the process.
    """
    data = stream.getvalue()
    (count,) = struct.unpack_from("<H", data, 4)
    entries = []
    for number in range(count):
        width, height, _, _, _, bits, _, offset = struct.unpack_from("<4BHHII", data, 6 + 16 * number)
        entries.append(_IconEntry((width or 256) * (height or 256), bits, offset))
    if not entries:
        raise ImageError("damaged ICO: an icon without a picture")
    content = io.BytesIO(data[max(entries).offset :])
    is_png = kind_of(content.getvalue()) is Kind.PNG
    image = PngImagePlugin.PngImageFile(content) if is_png else _IconBitmap(content)
    image.format = "ICO"
    return image
