"""Looks at an encoded image without decoding it: what a `SampleTable` holds of each sample."""

from __future__ import annotations

from typing import NamedTuple

from data_pipeline.common.errors import ImageError
from data_pipeline.common.image_kind import Kind, kind_of
from data_pipeline.decode.header import look_at_header
from data_pipeline.decode.jpeg import markers_are_sound

_MAX_SIDE = (1 << 31) - 1  # what a table holds


class Look(NamedTuple):
    """What one file is.

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
