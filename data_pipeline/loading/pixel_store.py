"""Holds the decoded images of a split once a machine: one process writes them, all of them read them.

The pixels are in memory without a name (memfd), which other processes map through the owner's /proc/PID/fd.
So the 64 MB that containers have in /dev/shm do not matter, and the kernel frees the memory when the last
process has ended, however it ended. Passing the descriptor through a socket would take a thread in the owner.

Layout: a page for the header, then the pixels, then a byte for each sample (`valid`), then text in UTF-8: the
reasons as JSON, or why it failed. The header is written last.

Legend: N samples of H x W pixels.
"""

from __future__ import annotations

import mmap
import os
import struct
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from data_pipeline.common.errors import WorkerError

_HEADER = struct.Struct("<16sqq")  # token, state, length of the text
_HEADER_BYTES = mmap.PAGESIZE
_FILLING, _COMPLETE, _FAILED = 0, 1, 2


class StoreAddress(NamedTuple):
    """Where a store is. Small, and can be pickled; good on this machine, for this user, as long as its owner.

    Attributes:
        pid, started: the owner, and when it started, in ticks: the kernel gives a number to another process.
        descriptor: the memory, in that process.
        token: random; the store has it in its header.
        num_samples, height, width: N, H, W.
    """

    pid: int
    started: int
    descriptor: int
    token: bytes
    num_samples: int
    height: int
    width: int


class PixelStore:
    """Decoded images in shared memory. Made by `create` in one process, and by `attach` in others.

    Attributes:
        pixels: (N, H, W, 3) uint8; zeros where a sample has failed. Only the owner can write.
        valid: (N) bool, which samples are decoded; all False at first.
        reasons: why each sample failed, by its number. In other processes, known once it is complete.
        address: what other processes attach to.
    """

    def __init__(self, descriptor: int, address: StoreAddress, *, writable: bool) -> None:
        self.address = address
        self.reasons: dict[int, str] = {}
        self._descriptor = descriptor
        access = mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ
        self._map = mmap.mmap(descriptor, _size_of(address), access=access)
        shape = (address.num_samples, address.height, address.width, 3)
        flat: npt.NDArray[np.uint8] = np.frombuffer(self._map, np.uint8)[_HEADER_BYTES:]
        self.pixels = flat[: -address.num_samples].reshape(shape)
        self.valid = flat[-address.num_samples :].view(np.bool_)

    @classmethod
    def create(cls, num_samples: int, height: int, width: int) -> PixelStore:
        """Make an empty store. Memory is taken as it is written to.

        Args:
            num_samples: N, >= 1.
            height: of every image, in pixels.
            width: of every image, in pixels.
        Raises:
            OSError: the kernel refuses so much.
        """
        assert num_samples > 0 and height > 0 and width > 0
        descriptor = os.memfd_create("pixels")
        try:
            pid, token = os.getpid(), os.urandom(16)
            address = StoreAddress(pid, _started_at(pid), descriptor, token, num_samples, height, width)
            os.ftruncate(descriptor, _size_of(address))
            os.pwrite(descriptor, _HEADER.pack(token, _FILLING, 0), 0)
            return cls(descriptor, address, writable=True)
        except BaseException:
            os.close(descriptor)
            raise

    @classmethod
    def attach(cls, address: StoreAddress) -> PixelStore:
        """Map the store of another process of this user, to read it. It may not be complete yet.

        Raises:
            WorkerError: its owner has ended or has closed it.
        """
        try:
            # not blocking: by now the number may be that of a pipe
            path, flags = f"/proc/{address.pid}/fd/{address.descriptor}", os.O_RDONLY | os.O_NONBLOCK
            descriptor = os.open(path, flags)
        except PermissionError as error:
            raise WorkerError(
                f"the shared images of process {address.pid} cannot be opened ({error.strerror}): "
                "do all ranks of this machine run as one user?"
            ) from error
        except OSError as error:
            raise _gone(address) from error
        try:
            with suppress(OSError, struct.error):  # another file has the number now
                if _read_header(descriptor)[0] == address.token:
                    return cls(descriptor, address, writable=False)
            raise _gone(address)
        except BaseException:
            os.close(descriptor)
            raise

    def complete(self) -> None:
        """Tell the other processes that all is written."""
        self._end(_COMPLETE, msgspec.json.encode(self.reasons))

    def fail(self, message: str) -> None:
        """Tell the other processes why there will be no more.

        Args:
            message: one line, which they raise.
        """
        self._end(_FAILED, message.encode("utf-8", "replace"))

    def wait_complete(self, poll_s: float = 0.05) -> None:
        """Wait until the owner has written all; then `reasons` are known.

        Args:
            poll_s: seconds between two looks.
        Raises:
            WorkerError: the owner has failed, or has ended before its work did.
        """
        while True:
            owner_lives = self._owner_lives()  # before the header, which may be its last act
            _, state, length = _read_header(self._descriptor)
            if state == _COMPLETE:
                self.reasons = msgspec.json.decode(self._text(length), type=dict[int, str])
                return
            if state == _FAILED:
                raise WorkerError(self._text(length).decode())
            if not owner_lives:
                raise _gone(self.address)
            time.sleep(poll_s)

    def close(self) -> None:
        """Let go of the memory. It is freed with the last array over it, in the last process."""
        if self._descriptor < 0:
            return
        os.close(self._descriptor)
        self._descriptor = -1
        self.pixels = np.empty((0, self.address.height, self.address.width, 3), np.uint8)
        self.valid = np.empty(0, np.bool_)
        del self._map  # not closed: the caller may have arrays over it, the last of which ends it

    def _owner_lives(self) -> bool:
        return _started_at(self.address.pid) == self.address.started

    def _text(self, length: int) -> bytes:
        return os.pread(self._descriptor, length, _size_of(self.address))

    def _end(self, state: int, text: bytes) -> None:
        os.pwrite(self._descriptor, text, _size_of(self.address))
        os.pwrite(self._descriptor, _HEADER.pack(self.address.token, state, len(text)), 0)


def _size_of(address: StoreAddress) -> int:
    return _HEADER_BYTES + address.num_samples * (address.height * address.width * 3 + 1)


def _read_header(descriptor: int) -> tuple[bytes, int, int]:
    token, state, length = _HEADER.unpack(os.pread(descriptor, _HEADER.size, 0))
    return token, state, length


def _started_at(pid: int) -> int:
    """When a process started, in ticks since the machine did; 0 if it has ended, reaped or not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return 0
    fields = stat.rpartition(b")")[2].split()  # the name before may contain anything
    return 0 if fields[0] in b"ZX" else int(fields[19])


def _gone(address: StoreAddress) -> WorkerError:
    return WorkerError(
        f"process {address.pid}, which decodes the images for all ranks of this machine, has ended: "
        "its own message says why; if there is none, it was killed, for lack of memory perhaps"
    )
