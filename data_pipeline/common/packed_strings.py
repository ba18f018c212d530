"""A sequence of millions of file names in little memory: one run of bytes, and where each name ends."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

_CHUNK = 1 << 16


class PackedStrings(Sequence[str]):
    """Names as a read-only sequence of str; a million of 30 bytes take 38 MB rather than 90.

    Args:
        blob: all names in the file system's encoding, one after the other.
        ends: (N) int64, where each name ends in `blob`, never falling.
    """

    def __init__(self, blob: bytes, ends: npt.NDArray[np.int64]) -> None:
        self.blob = blob
        self.ends = ends

    @classmethod
    def pack(cls, names: Iterable[str]) -> PackedStrings:
        """Pack names; they may hold bytes that are not UTF-8, as `os.fsdecode` gives them.

        >>> list(PackedStrings.pack(["a/1.jpg", "b/2.jpg"]))
        ['a/1.jpg', 'b/2.jpg']
        """
        if isinstance(names, PackedStrings):
            return names
        encoded = [os.fsencode(name) for name in names]
        return cls(b"".join(encoded), np.cumsum([len(name) for name in encoded], dtype=np.int64))

    @classmethod
    def join(cls, parts: Sequence[PackedStrings]) -> PackedStrings:
        """All names of several packs, in order."""
        sizes = np.concatenate([np.diff(part.ends, prepend=0) for part in parts])
        return cls(b"".join(part.blob for part in parts), np.cumsum(sizes))

    def take(self, indices: npt.NDArray[np.int64]) -> PackedStrings:
        """The names at some places."""
        starts = self.ends[indices - 1]  # not a copy of all ends: few of millions may be taken
        starts[indices == 0] = 0
        sizes = self.ends[indices] - starts
        source, parts = np.frombuffer(self.blob, dtype=np.uint8), []
        for first in range(0, len(indices), _CHUNK):  # copying needs eight bytes of index for each byte
            begins, lengths = starts[first : first + _CHUNK], sizes[first : first + _CHUNK]
            shifts = np.repeat(begins - (np.cumsum(lengths) - lengths), lengths)
            parts.append(source[np.arange(len(shifts)) + shifts].tobytes())
        return PackedStrings(b"".join(parts), np.cumsum(sizes))

    def padded(
        self, indices: npt.NDArray[np.int64], prefix: bytes = b"", min_width: int = 0
    ) -> npt.NDArray[np.uint8]:
        """The names at some places as rows of one array, for code that takes no Python strings.

        Args:
            indices: (N) places.
            prefix: put before each name.
            min_width: least width of a row.
        Returns:
            (N, width) uint8: prefix and name, filled up with zeros, of which there is one at least.

        >>> PackedStrings.pack(["a", "bcd"]).padded(np.array([1, 0]), b"/").tobytes()
        b'/bcd\\x00/a\\x00\\x00\\x00'
        """
        ends = self.ends[indices]
        starts = np.where(indices > 0, self.ends[indices - 1], 0)
        lengths = ends - starts
        first = len(prefix)
        rows = np.zeros((len(indices), max(first + int(lengths.max(initial=0)) + 1, min_width)), np.uint8)
        rows[:, :first] = np.frombuffer(prefix, np.uint8)
        columns = np.arange(int(lengths.max(initial=0)))
        inside = columns < lengths[:, None]
        blob = np.frombuffer(self.blob, dtype=np.uint8)
        rows[:, first : first + len(columns)][inside] = blob[(starts[:, None] + columns)[inside]]
        return rows

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> str:  # type: ignore[override]  # `take` is for several
        if index < 0:
            index += len(self)
        if not 0 <= index < len(self):
            raise IndexError(f"name {index} of {len(self)}")
        start = int(self.ends[index - 1]) if index else 0
        return os.fsdecode(self.blob[start : int(self.ends[index])])

    def __iter__(self) -> Iterator[str]:
        start = 0
        for end in self.ends.tolist():
            yield os.fsdecode(self.blob[start:end])
            start = end
