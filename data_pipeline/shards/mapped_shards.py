"""Tar shards: mapped into memory, for readers that copy nothing, or read in pieces through few open files."""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
import resource
import threading
import weakref
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_pipeline.common.text import printable

log = logging.getLogger("data_pipeline")

MAX_OPEN = 64
_ADVISED_CALLS = 64
Bytes = npt.NDArray[np.uint8]
Int = npt.NDArray[np.int64]

_FAILED = ctypes.c_void_p(-1).value


class ShardFiles:
    """The shards of a split, each opened or mapped when it is first needed. Any thread may use it.

    At most `MAX_OPEN` files are open that are not being read; a mapping needs none. A shard that cannot be
    mapped, or whose file has another size than it had then, is not used again, and one
    log line says so: to touch what lay behind the new end would kill the process.

    Attributes:
        num_changes: how often a shard was found to be written to since it was mapped.
    """

    def __init__(self, shards: tuple[Path, ...]) -> None:
        self._shards = shards
        self.num_changes = 0
        self._mapped: dict[int, Bytes | None] = {}
        self._modified_ns: dict[int, int] = {}
        self._lock = threading.Lock()
        self._open = lru_cache(maxsize=MAX_OPEN)(_OpenFile)
        self._advised_calls, self._waits = _ADVISED_CALLS, 0

    def __reduce__(self) -> tuple[type[ShardFiles], tuple[tuple[Path, ...]]]:
        """Another process opens and maps the shards for itself."""
        return ShardFiles, (self._shards,)

    def read(self, shard: int, size: int, offset: int) -> bytes:
        """Read a piece of a shard. Reads do not move a common position."""
        file = self._open(self._shards[shard])  # kept by this name: another thread may evict it meanwhile
        return os.pread(file.descriptor, size, offset)

    def bytes_of(self, shard: int) -> Bytes | None:
        """All bytes of a shard, read-only, if its file has them now; None if they cannot be used."""
        if shard not in self._mapped:
            with self._lock:
                if shard not in self._mapped:
                    self._map(shard)
        mapped = self._mapped[shard]
        if mapped is None:
            return None
        path = self._shards[shard]
        try:
            status = os.stat(path)  # noqa: PTH116 - half the cost of Path.stat
        except OSError as error:
            self._give_up(shard, f"cannot be read any more ({error.strerror})")
            return None
        if status.st_size != mapped.size:
            self._give_up(shard, f"had {mapped.size} bytes and has {status.st_size}")
            return None
        if status.st_mtime_ns != self._modified_ns[shard]:
            self._modified_ns[shard] = status.st_mtime_ns
            self.num_changes += 1
        return mapped

    def is_cold(self) -> bool:
        """Whether `read_ahead` pays now: for some calls at first, and after this process waited for a disk.

        Reading ahead costs two microseconds an image, and makes cold data several times faster.
        """
        if (waits := resource.getrusage(resource.RUSAGE_SELF).ru_majflt) > self._waits:
            self._waits, self._advised_calls = waits, _ADVISED_CALLS
        self._advised_calls -= 1
        return self._advised_calls >= 0

    def read_ahead(self, shard: int, offsets: Int, sizes: Int) -> None:
        """Tell the system that some ranges of a shard are needed soon: it reads them meanwhile, all at once.

        Else a reader of cold data waits for each range in turn, and each of its pages may be a read.
        """
        if (mapped := self.bytes_of(shard)) is None:
            return
        begins = mapped.__array_interface__["data"][0] + offsets
        pages = begins & -mmap.PAGESIZE
        advise = _libc().madvise
        for page, length in zip(pages.tolist(), (begins + sizes - pages).tolist(), strict=True):
            advise(page, length, mmap.MADV_WILLNEED)

    def _map(self, shard: int) -> None:
        try:
            self._modified_ns[shard] = self._shards[shard].stat().st_mtime_ns
            self._mapped[shard] = np.asarray(_Mapping(self._shards[shard]))
        except OSError as error:
            self._give_up(shard, f"cannot be mapped into memory ({error.strerror})")

    def _give_up(self, shard: int, reason: str) -> None:
        self._mapped[shard] = None
        log.info("shard %s %s: its images are read one by one", printable(self._shards[shard]), reason)


class _OpenFile:
    """An open file, closed when nobody refers to it any more."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self.descriptor)


class _Mapping:
    """One file in memory, read-only; it is unmapped when no array refers to it any more.

    Not `mmap.mmap`, which before Python 3.13 keeps a file open for each mapping: a process may have 1024.
    """

    def __init__(self, path: Path) -> None:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            size = os.fstat(descriptor).st_size
            address = _libc().mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0)
            number = ctypes.get_errno()
        finally:
            os.close(descriptor)
        if address == _FAILED:  # of an empty file, for one
            raise OSError(number, os.strerror(number))
        self.__array_interface__ = {"version": 3, "typestr": "|u1", "shape": (size,), "data": (address, True)}
        # not at exit: threads of a decoder may read to the end
        weakref.finalize(self, _libc().munmap, address, size).atexit = False


@lru_cache(maxsize=1)
def _libc() -> Any:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [
        ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_ssize_t
    ]  # fmt: skip
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    return libc
