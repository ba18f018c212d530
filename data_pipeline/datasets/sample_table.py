"""The sample table: what a loader must know of each image of a split before it reads it.

Sizes and orientations from the headers, and which files DALI may read, are found once and kept, so that a
loader plans a batch with a few array operations, and no Python for each of its images.

Legend: N samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from data_pipeline.common.image_kind import Kind

Int = npt.NDArray[np.int64]
Column = Sequence[int] | Int

_ON_DISK = tuple(map(np.dtype, ("<i8", "(2,)<i4", "u1", "u1", "u1")))
"""The types of the columns."""
ROW_BYTES = sum(kind.itemsize for kind in _ON_DISK)
"""Bytes of a sample on disk: 19."""


@dataclass(frozen=True, eq=False)
class SampleTable:
    """Properties of each image of a split, as arrays; read-only, but for those that `distrust` changes.

    A file may have changed since it was looked at: who reads it compares its length with the table's.

    Attributes:
        lengths: (N) int64, bytes of each file; 0 where it could not be read.
        sizes: (N, 2) int32, height and width of the upright image, >= 1; (1, 1) where its header could not be
            read. They are not compared with any limit.
        kinds: (N) uint8, see `Kind`; 0 where the header could not be read.
        orientations: (N) uint8, EXIF orientation 1..8; 1 where there is none.
        direct: (N) bool, whether DALI reads the file whole and right; the others are for Pillow.
    """

    lengths: Int
    sizes: npt.NDArray[np.int32]
    kinds: npt.NDArray[np.uint8]
    orientations: npt.NDArray[np.uint8]
    direct: npt.NDArray[np.bool_]

    def __post_init__(self) -> None:
        for column in self._columns():
            column.setflags(write=False)
        object.__setattr__(self, "direct", self.direct.astype(np.bool_))  # this process's own

    def __len__(self) -> int:
        return len(self.lengths)

    @classmethod
    def from_columns(
        cls,
        lengths: Column,
        kinds: Column,
        heights: Column,
        widths: Column,
        orientations: Column,
        direct: Column,
    ) -> SampleTable:
        """Make a table from columns of N integers each, behind the lengths in the order of `Look`.

        Raises:
            ValueError: columns of different lengths, or a value that no look at a file gives.
        """
        try:
            columns = np.array([lengths, heights, widths, kinds, orientations, direct], dtype=np.int64)
        except OverflowError as error:
            raise ValueError(str(error)) from error
        parts = columns[0], columns[1:3].T, *columns[3:]
        _check(*parts)
        return cls(*(part.astype(kind.base) for part, kind in zip(parts, _ON_DISK, strict=True)))

    @classmethod
    def join(cls, parts: Sequence[SampleTable]) -> SampleTable:
        """All rows of one or more tables, in order."""
        columns = zip(*(part._columns() for part in parts), strict=True)
        return cls(*(np.concatenate(column) for column in columns))

    def distrust(self, indices: Int) -> None:
        """Mark samples as not `direct`, in this process: a decoder has refused them, or they have changed."""
        self.direct[indices] = False

    def take(self, indices: Int) -> SampleTable:
        """The rows at some places, in the order given."""
        return SampleTable(*(column[indices] for column in self._columns()))

    def pack(self) -> bytes:
        """The table as bytes, column by column, little-endian: `ROW_BYTES` a sample."""
        columns = zip(_ON_DISK, self._columns(), strict=True)
        return b"".join(column.astype(kind.base, copy=False).tobytes() for kind, column in columns)

    @classmethod
    def unpack(cls, content: bytes | memoryview) -> SampleTable:
        """Read what `pack` wrote, without copying it; `content` may come from anybody.

        Raises:
            ValueError: it is not of the length of whole rows, or a value is none that a look at a file gives.
        """
        count, rest = divmod(len(content), ROW_BYTES)
        if rest:
            raise ValueError(f"{len(content)} bytes are no whole rows of {ROW_BYTES}")
        columns: list[npt.NDArray[Any]] = []
        start = 0
        for kind in _ON_DISK:
            columns.append(np.frombuffer(content, kind, count, start))
            start += columns[-1].nbytes
        _check(*columns)
        return cls(*columns)

    def _columns(self) -> list[npt.NDArray[Any]]:
        return [getattr(self, field.name) for field in fields(self)]


def _check(
    lengths: npt.NDArray[Any],
    sizes_N2: npt.NDArray[Any],
    kinds: npt.NDArray[Any],
    orientations: npt.NDArray[Any],
    direct: npt.NDArray[Any],
) -> None:
    """Compare all values with the ranges that `SampleTable` promises.

    Raises:
        ValueError: naming the first column that does not fit.
    """
    ranges = (
        ("a length", lengths, 0, np.iinfo(np.int64).max),
        ("a size", sizes_N2, 1, np.iinfo(np.int32).max),
        ("a kind", kinds, 0, max(Kind)),
        ("an orientation", orientations, 1, 8),
        ("what DALI may read", direct, 0, 1),
    )
    for name, values, lowest, highest in ranges:
        if values.size and not lowest <= values.min() <= values.max() <= highest:
            raise ValueError(f"{name} is not within {lowest}..{highest}")
    if bool((direct > kinds).any()):  # direct, and of kind 0
        raise ValueError("a sample that cannot be read is marked for DALI")
