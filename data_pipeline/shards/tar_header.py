"""Compares the tar header before an image with what the shard's index says: one header, or many at once.

Legend: N headers of B = 512 bytes.
"""

from __future__ import annotations

import os

import numpy as np
import numpy.typing as npt

from data_pipeline.common.packed_strings import PackedStrings

Bytes = npt.NDArray[np.uint8]
Int = npt.NDArray[np.int64]

_NAME = 100
"""Bytes of the name's field. A longer name stands in a header of its own, and is not compared."""
_CHECKSUM, _SIZE, _TYPE, _PREFIX = slice(148, 156), slice(124, 136), 156, 345
_SPACE, _ZERO = ord(" "), ord("0")


def header_fits(header: bytes, member: str, size: int) -> bool:
    """Whether a tar header is sound, and that of a regular file of this name and size."""
    try:
        checksum = int(header[_CHECKSUM].strip(b" \0") or b"-1", 8)
        stored = int(header[_SIZE].strip(b" \0") or b"-1", 8)
    except ValueError:
        return False
    sound = checksum == sum(header) - sum(header[_CHECKSUM]) + 8 * _SPACE
    name = os.fsencode(member)
    same = len(name) >= _NAME or header[_PREFIX] != 0 or header[:_NAME].rstrip(b"\0") == name
    return sound and stored == size and header[_TYPE] in (0, _ZERO) and same


def headers_fit(headers_NB: Bytes, members: PackedStrings, sizes: Int) -> npt.NDArray[np.bool_]:
    """`header_fits` for many headers, in a few array operations.

    Args:
        headers_NB: (N, 512) uint8.
        members: N names.
        sizes: (N) bytes of each image.
    Returns:
        (N) bool. False also for some headers that `header_fits` accepts, with numbers that no tar writes.
    """
    checksums = headers_NB.sum(axis=1, dtype=np.uint32).astype(np.int64)
    checksums -= headers_NB[:, _CHECKSUM].sum(axis=1, dtype=np.int64) - 8 * _SPACE
    kinds = headers_NB[:, _TYPE]
    fits: npt.NDArray[np.bool_] = (kinds == 0) | (kinds == _ZERO)
    fits &= _octal(headers_NB[:, _CHECKSUM]) == checksums
    fits &= _octal(headers_NB[:, _SIZE]) == sizes
    fits &= _names_fit(headers_NB, members)
    return fits


def _octal(fields_NW: Bytes) -> Int:
    """The number in each field: octal digits side by side among spaces and zero bytes; else -1."""
    digits = fields_NW - np.uint8(_ZERO)  # what is below "0" becomes large
    is_digit = digits < 8
    blank = (fields_NW == 0) | (fields_NW == _SPACE)
    # a number begins where a digit follows none
    begins = is_digit[:, 0] + (is_digit[:, 1:] & ~is_digit[:, :-1]).sum(axis=1)
    behind = np.cumsum(is_digit[:, ::-1], axis=1, dtype=np.int64)[:, ::-1] - is_digit  # digits to the right
    numbers: Int = ((digits.astype(np.int64) << 3 * behind) * is_digit).sum(axis=1)
    numbers[(begins != 1) | ~(is_digit | blank).all(axis=1)] = -1
    return numbers


def _names_fit(headers_NB: Bytes, members: PackedStrings) -> npt.NDArray[np.bool_]:
    long = np.diff(members.ends, prepend=0) >= _NAME
    expected = members.padded(np.arange(len(members)), min_width=_NAME)[:, :_NAME]
    fits: npt.NDArray[np.bool_] = (headers_NB[:, :_NAME] == expected).all(axis=1)
    fits |= long | (headers_NB[:, _PREFIX] != 0)
    return fits
