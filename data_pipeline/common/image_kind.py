"""The kinds of image files that are read: their first bytes, and the numbers that are kept of them."""

from __future__ import annotations

import re
from enum import IntEnum


class Kind(IntEnum):
    """A file's kind, by its first bytes. The numbers are on disk: add to them, do not change them."""

    UNREADABLE = 0
    JPEG = 1
    PNG = 2
    BMP = 3
    WEBP = 4
    TIFF = 5
    GIF = 6
    PNM = 7
    AVIF = 8
    JPEG2000 = 9
    ICO = 10
    TGA = 11


KIND_NAMES = {kind: kind.name for kind in Kind} | {Kind.WEBP: "WebP", Kind.JPEG2000: "JPEG 2000"}
"""The kinds for people."""

HEAD_BYTES = 64
"""So many bytes from the start tell the kind."""

_MAGIC = (
    (b"\xff\xd8\xff", Kind.JPEG),
    (b"\x89PNG\r\n\x1a\n", Kind.PNG),
    (b"BM", Kind.BMP),
    (b"RIFF", Kind.WEBP),
    (b"II*\0", Kind.TIFF),
    (b"MM\0*", Kind.TIFF),
    (b"GIF8", Kind.GIF),
    (b"\0\0\0\x0cjP  \r\n\x87\n", Kind.JPEG2000),
    (b"\xff\x4f\xff\x51", Kind.JPEG2000),
    (b"\0\0\1\0", Kind.ICO),
)
_PNM = re.compile(rb"P[1-6]\s\s*[#\d]")
_DIB_HEADERS = (12, 40, 52, 56, 64, 108, 124)


class TargaBytes(bytes):
    """The bytes of a file that is named .tga: of this format alone the name tells, since it has no magic."""


def name_bytes(data: bytes, name: str) -> bytes:
    """The bytes of a file, marked where only its name says what they are.

    >>> type(name_bytes(b"x", "a/b.TGA")).__name__, type(name_bytes(b"x", "a/b.jpg")).__name__
    ('TargaBytes', 'bytes')
    """
    return TargaBytes(data) if name[-4:].lower() == ".tga" else data


def kind_of(data: bytes) -> Kind:
    """The kind of a file by its first bytes; `UNREADABLE` for one that is none of ours.

    >>> kind_of(b"GIF89a..."), kind_of(b"P6\\n8 8\\n255\\n"), kind_of(b"text")
    (<Kind.GIF: 6>, <Kind.PNM: 7>, <Kind.UNREADABLE: 0>)
    """
    for magic, kind in _MAGIC:
        if data.startswith(magic):
            return kind
    if _PNM.match(data):
        return Kind.PNM
    if data[4:8] == b"ftyp" and _has_avif_brand(data[:HEAD_BYTES]):
        return Kind.AVIF
    return Kind.TGA if isinstance(data, TargaBytes) and data else Kind.UNREADABLE


def is_image_head(head: bytes) -> bool:
    """Whether the first bytes of a file without a suffix are an image's: two letters are not enough for that.

    >>> is_image_head(b"BMW X5, and other cars"), is_image_head(b"RIFF....WAVEfmt ")
    (False, False)
    """
    kind = kind_of(head)
    if kind is Kind.BMP:
        return int.from_bytes(head[14:18], "little") in _DIB_HEADERS
    if kind is Kind.WEBP:
        return head[8:12] == b"WEBP"
    if kind is Kind.ICO:
        return head[4:6] != b"\0\0" and len(head) > 22
    return kind is not Kind.UNREADABLE


def _has_avif_brand(head: bytes) -> bool:
    if head[8:12] in (b"avif", b"avis"):
        return True
    brands = head[16 : int.from_bytes(head[:4], "big")]
    return head[8:12] in (b"mif1", b"msf1") and b"avif" in brands
