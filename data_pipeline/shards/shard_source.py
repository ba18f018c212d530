"""Reading single samples out of tar shards: open files bounded, any number of threads."""

from __future__ import annotations

import os
import threading
import weakref
from pathlib import Path

import numpy as np
import numpy.typing as npt

from data_pipeline.common.errors import ImageError
from data_pipeline.datasets.packed_strings import PackedStrings
from data_pipeline.shards.shard_format import BLOCK

Int = npt.NDArray[np.int64]

MAX_HANDLES = 64


class ShardSource:
    """Samples in tar shards; see `image_folder.SampleReader`. The arrays have an entry for each sample."""

    def __init__(
        self,
        root: Path,
        shards: tuple[Path, ...],
        handles: Handles,
        shard_of: Int,
        offsets: Int,
        sizes: Int,
        members: PackedStrings,
    ) -> None:
        self.root, self.shards, self.handles = root, shards, handles
        self.shard_of, self.offsets, self.sizes, self.members = shard_of, offsets, sizes, members
        self._names = tuple(os.path.relpath(shard, root) for shard in shards)

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
        return f"{self._names[int(self.shard_of[index])]}/{self.members[index]}"

    def take(self, indices: Int) -> ShardSource:
        """The source of some of the samples; it shares the open files."""
        return ShardSource(
            self.root,
            self.shards,
            self.handles,
            self.shard_of[indices],
            self.offsets[indices],
            self.sizes[indices],
            self.members.take(indices),
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
        self._lock = threading.Lock()
        self._open: dict[int, int] = {}  # in the order of their last use
        self._users: dict[int, int] = {}
        self._finalizer = weakref.finalize(self, _close_all, self._open)

    def __reduce__(self) -> tuple[type[Handles], tuple[tuple[Path, ...]]]:
        """Another process opens the shards for itself."""
        return Handles, (self._shards,)

    def read(self, shard: int, size: int, offset: int) -> bytes:
        with self._lock:
            descriptor = self._open.pop(shard, -1)
            if descriptor < 0:
                descriptor = os.open(self._shards[shard], os.O_RDONLY | os.O_CLOEXEC)
            self._open[shard] = descriptor
            self._users[shard] = self._users.get(shard, 0) + 1
            if len(self._open) > MAX_HANDLES:
                idle = next((s for s in self._open if not self._users.get(s)), None)
                if idle is not None:
                    os.close(self._open.pop(idle))
        try:
            return os.pread(descriptor, size, offset)
        finally:
            with self._lock:
                self._users[shard] -= 1


def _close_all(descriptors: dict[int, int]) -> None:
    while descriptors:
        os.close(descriptors.popitem()[1])
