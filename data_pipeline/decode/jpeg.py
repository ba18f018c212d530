"""Checks the markers of a JPEG, without decoding it.

DALI's decoders skip a marker that bit rot made inside the compressed data; Pillow refuses such a file.
A file that looks odd here is given to Pillow, which decides, so that both backends fail the same files.
"""

from __future__ import annotations

import re

_END = 0xD9
_SCAN = 0xDA
_STANDALONE = frozenset({0x01, *range(0xD0, 0xD9)})
_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
"""A marker inside compressed data: neither a stuffed byte, nor a restart, nor padding."""


def markers_are_sound(data: bytes) -> bool:
    """Whether segments follow one another without a gap from the first byte to the end of the image.

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
