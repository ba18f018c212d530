"""Looks at an encoded image without decoding it: what a `SampleTable` holds of each sample."""

from __future__ import annotations

import re
from typing import NamedTuple

from data_pipeline.common.errors import ImageError
from data_pipeline.common.image_kind import Kind, kind_of
from data_pipeline.decode.header import look_at_header

_MAX_SIDE = (1 << 31) - 1  # what a table holds
_END = 0xD9
_SCAN = 0xDA
_STANDALONE = frozenset({0x01, *range(0xD0, 0xD9)})
_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
"""A marker inside compressed data: neither a stuffed byte, nor a restart, nor padding."""


class Look(NamedTuple):
    """Properties of one image file.

    Attributes:
        kind: of file; `Kind.UNREADABLE` where its header cannot be read.
        height: of the upright image, in pixels; 1 where its header cannot be read.
        width: the same.
        orientation: EXIF orientation 1..8; 1 where there is none, and for TIFF, which Pillow turns itself.
        direct: whether DALI reads the file whole and right, as far as its header and its markers tell.
    """

    kind: Kind
    height: int
    width: int
    orientation: int
    direct: bool


UNREADABLE = Look(Kind.UNREADABLE, 1, 1, 1, False)


def look_at(data: bytes) -> Look:
    """Look at a file. Nothing fails, and no limit is applied: what cannot be read is `UNREADABLE`.

    Args:
        data: the file's bytes; none for a file that cannot be read.
    """
    try:
        height, width, orientation = look_at_header(data)
    except ImageError:
        return UNREADABLE
    if not 1 <= min(height, width) <= max(height, width) <= _MAX_SIDE:
        return UNREADABLE
    return Look(kind_of(data), height, width, orientation, not is_for_pillow(data))


def is_for_pillow(data: bytes) -> bool:
    """Whether Pillow must read a file: one that DALI does not know (GIF, extended WebP, all the rarer kinds),
    reads although it is truncated (TIFF) or damaged (JPEG), or refuses with output on stderr (truncated PNG,
    JPEG without image).
    """
    kind = kind_of(data)
    if kind is Kind.JPEG:
        return not markers_are_sound(data)
    if kind is Kind.PNG:
        return b"IEND" not in data[-64:]
    if kind is Kind.WEBP:
        return data[8:16] == b"WEBPVP8X"
    return kind is not Kind.BMP


def markers_are_sound(data: bytes) -> bool:
    """Whether segments follow one another without a gap from the first byte to the end of the image.

    DALI's decoders skip a marker that bit rot made inside the compressed data; Pillow refuses such a file.
    A file that looks odd here is given to Pillow, which decides, so that both backends fail the same files.

    Args:
        data: a JPEG file, from its first two bytes.
    Returns:
        True where every segment begins where the one before it ends, there is a scan, and the compressed data
        ends in the end marker. Data that a camera appended behind it is ignored.
    Source: ITU-T T.81, annex B.

    >>> markers_are_sound(b"\\xff\\xd8" + b"\\xff\\xda\\x00\\x02" + b"\\x12\\xff\\x00\\x34" + b"\\xff\\xd9")
    True
    >>> markers_are_sound(b"\\xff\\xd8" + b"\\xff\\xda\\x00\\x02" + b"\\x12\\xff\\x24\\x34" + b"\\xff\\xd9")
    False
    """
    at, scans, size = 2, 0, len(data)
    while at + 1 < size and data[at] == 0xFF:
        kind = data[at + 1]
        if kind == 0xFF:  # padding in front of a marker
            at += 1
        elif kind == _END:
            return scans > 0
        elif kind in _STANDALONE:
            return False
        else:
            at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
            if kind == _SCAN:
                scans += 1
                found = _MARKER.search(data, at)
                if found is None:
                    return False
                at = found.start()
    return False
