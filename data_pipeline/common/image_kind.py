"""The kinds of image files that are read, as numbers that tables and shard indexes keep."""

from __future__ import annotations

from enum import IntEnum


class Kind(IntEnum):
    """What a file's first bytes say that it is. The numbers are on disk: add to them, do not change them."""

    UNREADABLE = 0
    JPEG = 1
    PNG = 2
    BMP = 3
    WEBP = 4
    TIFF = 5
    GIF = 6
