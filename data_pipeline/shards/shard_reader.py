"""Reads samples out of tar shards: single ones through few open files, or batches of them without copies."""

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
from data_pipeline.shards.mapped_shards import MappedShards
from data_pipeline.shards.shard_format import BLOCK
from data_pipeline.shards.tar_header import header_fits, headers_fit

Int = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]

MAX_HANDLES = 64
_NO_IMAGE = np.frombuffer(b"", dtype=np.uint8)
_NO_HEADER = np.frombuffer(bytes(BLOCK), dtype=np.uint8)


@dataclass(frozen=True, eq=False)
class ShardReader:
    """The samples of a split in its tar shards.

    Attributes:
        shards: the tar files, relative to the data folder.
        handles: the same files, opened as they are needed.
        mapped: the same files, mapped into memory as they are needed.
        shard_of: (N) which shard holds each sample.
        offsets: (N) where its image begins, in bytes.
        sizes: (N) the image's bytes.
        members: (N) the image's name in the tar.
    """

    shards: tuple[str, ...]
    handles: Handles
    mapped: MappedShards
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

    def views(self, indices: Int) -> tuple[list[Bytes], npt.NDArray[np.bool_]]:
        """The bytes of a batch, in the shards' memory: nothing is copied, and no file is opened.

        The header before each image is compared as `read` does. Shards that have become shorter are found
        here; one that is truncated while a view of it is in use kills the process (SIGBUS).

        Args:
            indices: (n) which samples.
        Returns:
            n read-only arrays of uint8, and (n) whether each holds its image. One that does not is empty:
            `read` tells why, or reads it all the same.
        """
        shard_of, sizes = self.shard_of[indices].tolist(), self.sizes[indices]
        begins = self.offsets[indices]
        shards = {shard: self.mapped.bytes_of(shard) for shard in set(shard_of)}
        headers, views = [], []
        for shard, begin, end in zip(shard_of, begins.tolist(), (begins + sizes).tolist(), strict=True):
            content = shards[shard]
            if content is None or begin < BLOCK or end > content.size:
                headers.append(_NO_HEADER)
                views.append(_NO_IMAGE)
            else:
                headers.append(content[begin - BLOCK : begin])
                views.append(content[begin:end])
        headers_NB = np.concatenate([_NO_IMAGE, *headers]).reshape(-1, BLOCK)
        valid = headers_fit(headers_NB, self.members.take(indices), sizes) & (sizes > 0)
        for place in np.flatnonzero(~valid).tolist():
            views[place] = _NO_IMAGE
        return views, valid

    def read_ahead(self, indices: Int) -> None:
        """Have the system read a batch from the disk, without waiting for it; `views` of it come later.

        Args:
            indices: which samples.
        """
        shard_of, offsets, sizes = self.shard_of[indices], self.offsets[indices], self.sizes[indices]
        order = np.argsort(shard_of, kind="stable")
        shards, firsts = np.unique(shard_of[order], return_index=True)
        for shard, places in zip(shards.tolist(), np.split(order, firsts[1:]), strict=True):
            self.mapped.read_ahead(shard, offsets[places] - BLOCK, sizes[places] + BLOCK)

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
