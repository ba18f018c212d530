"""Reads single samples out of tar shards: any number of threads, a bounded number of open files."""

from __future__ import annotations

import os
import weakref
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from data_pipeline.common.errors import ImageError
from data_pipeline.common.packed_strings import PackedStrings
from data_pipeline.shards.shard_format import BLOCK

Int = npt.NDArray[np.int64]

MAX_HANDLES = 64


@dataclass(frozen=True, eq=False)
class ShardReader:
    """The samples of a split in its tar shards.

    Attributes:
        shards: the tar files, relative to the data folder.
        handles: the same files, opened as they are needed.
        shard_of: (N) which shard holds each sample.
        offsets: (N) where its image begins, in bytes.
        sizes: (N) the image's bytes.
        members: (N) the image's name in the tar.
    """

    shards: tuple[str, ...]
    handles: Handles
    shard_of: Int
    offsets: Int
    sizes: Int
    members: PackedStrings

    def read(self, index: int, max_bytes: int) -> bytes:
        """The bytes of one sample, if the tar header before them is that of the member the index names."""
        offset, size = int(self.offsets[index]), int(self.sizes[index])
        if size > max_bytes:
            raise ImageError(f"file of {size} bytes is above the limit of {max_bytes}")
        try:
            data = self.handles.read(int(self.shard_of[index]), size + BLOCK, offset - BLOCK)
        except OSError as error:
            raise ImageError(f"cannot be read: {error.strerror or error}") from error
        if len(data) < size + BLOCK:
            raise ImageError("its shard has become shorter than its index says")
        if not header_fits(data[:BLOCK], self.members[index], size):
            raise ImageError("its shard and the shard's index do not fit each other")
        if not size:
            raise ImageError("empty file")
        return data[BLOCK:]

    def name_at(self, index: int) -> str:
        """Such as `train/shard-000000.tar/00000123.jpg`."""
        return f"{self.shards[int(self.shard_of[index])]}/{self.members[index]}"

    def take(self, indices: Int) -> ShardReader:
        """The reader of some of the samples; it shares the open files."""
        return replace(
            self,
            shard_of=self.shard_of[indices],
            offsets=self.offsets[indices],
            sizes=self.sizes[indices],
            members=self.members.take(indices),
        )


def header_fits(header: bytes, member: str, size: int) -> bool:
    """Whether a tar header is sound, and that of a regular file of this name and size.

    Names above 99 bytes stand in a header of their own, and are not compared.
    """
    try:
        checksum = int(header[148:156].strip(b" \0") or b"-1", 8)
        stored = int(header[124:136].strip(b" \0") or b"-1", 8)
    except ValueError:
        return False
    sound = checksum == sum(header) - sum(header[148:156]) + 8 * ord(" ")
    name = os.fsencode(member)
    same = len(name) > 99 or header[345:346] != b"\0" or header[:100].rstrip(b"\0") == name
    return sound and stored == size and header[156:157] in (b"0", b"\0") and same


class Handles:
    """Open shards, at most `MAX_HANDLES` that are not being read. Reads do not move a common position."""

    def __init__(self, shards: tuple[Path, ...]) -> None:
        self._shards = shards
        self._open = lru_cache(maxsize=MAX_HANDLES)(_OpenFile)

    def __reduce__(self) -> tuple[type[Handles], tuple[tuple[Path, ...]]]:
        """Another process opens the shards for itself."""
        return Handles, (self._shards,)

    def read(self, shard: int, size: int, offset: int) -> bytes:
        file = self._open(self._shards[shard])  # kept by this name: another thread may evict it meanwhile
        return os.pread(file.descriptor, size, offset)


class _OpenFile:
    """An open file, closed when nobody refers to it any more."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self.descriptor)
