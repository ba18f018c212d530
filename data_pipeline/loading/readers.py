"""Reads encoded images and their headers, in this process or in processes of their own.

Python's own work for a file holds the interpreter for about a tenth of a millisecond: any number of threads
reads some 8,000 images a second together. That feeds a CPU many times over, but not a GPU that decodes;
there, processes read, and this one only takes over their bytes, a batch at a time.

The processes run `python -m data_pipeline.loading.readers`, not `multiprocessing.Process`: that would import
the main module, and with it torch, in each of them.
"""

from __future__ import annotations

import mmap
import os
import pickle
import queue
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any, Protocol

from data_pipeline.common.errors import ImageError, WorkerError
from data_pipeline.decode.pillow import read_header
from data_pipeline.transforms.sampler import Int

# A file larger than the largest image that we accept, uncompressed in four channels of 16 bits, is not read.
MAX_BYTES_PER_PIXEL = 8


@dataclass(frozen=True)
class EncodedImage:
    """One file's bytes and upright size; or None, with the reason why it cannot be used."""

    data: bytes | None
    height_width: tuple[int, int] = (1, 1)
    reason: str = ""


class Samples(Protocol):
    """Encoded images by index, such as those of a `Dataset`. Threads may read at the same time."""

    def read(self, index: int, max_bytes: int) -> bytes:
        """The bytes of one image, at most so many; raises `ImageError`."""


FetchFn = Callable[[Samples, Int, int], list["EncodedImage"]]
"""As `fetch_images`, which reads in the thread that calls it."""


def fetch_images(samples: Samples, indices: Int, max_pixels: int) -> list[EncodedImage]:
    """Read images and their headers.

    Args:
        samples: where they are.
        indices: (N) which of them.
        max_pixels: cap on an image's pixels, by its header.
    """
    files = []
    for index in indices.tolist():
        try:
            data = samples.read(index, MAX_BYTES_PER_PIXEL * max_pixels)
            files.append(EncodedImage(data, read_header(data, max_pixels)))
        except ImageError as error:
            files.append(EncodedImage(None, reason=str(error)))
    return files


class ReaderPool:
    """Processes that read samples of some datasets, for as many threads at once as there are processes.

    Each process holds a copy of the datasets' index: 40 MB for ImageNet's training set.

    Args:
        datasets: the datasets that may be read.
        num_processes: how many, >= 1.
    """

    def __init__(self, datasets: Sequence[Samples], num_processes: int) -> None:
        self.num_processes = num_processes
        self._datasets = tuple(datasets)
        self._idle: queue.SimpleQueue[_Process] = queue.SimpleQueue()
        self._processes = [_Process() for _ in range(num_processes)]
        index = pickle.dumps(self._datasets)
        for process in self._processes:  # all start at once, and unpickle the index in parallel
            process.send(index)
            self._idle.put(process)

    def holds(self, samples: Samples) -> bool:
        """Whether these samples are one of the pool's datasets."""
        return any(known is samples for known in self._datasets)

    def fetch(self, samples: Samples, indices: Int, max_pixels: int) -> list[EncodedImage]:
        """As `fetch_images`, in one process.

        Raises:
            WorkerError: the process was killed.
        """
        number = next(i for i, known in enumerate(self._datasets) if known is samples)
        process = self._idle.get()
        try:
            process.send(pickle.dumps((number, indices, max_pixels)))
            return process.receive()
        finally:
            self._idle.put(process)

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.end()


class _Process:
    """One reading process: requests and answers go through a pipe, the files' bytes through shared memory."""

    def __init__(self) -> None:
        self._file = os.memfd_create("images")
        self._shared: mmap.mmap | None = None
        self._pipe, theirs = Pipe()
        with theirs:  # closed here once the child has it: when the child dies, the pipe ends
            inherited = [theirs.fileno(), self._file]
            self._child = subprocess.Popen(
                [sys.executable, "-m", "data_pipeline.loading.readers", *map(str, inherited)],
                stdin=subprocess.DEVNULL,
                pass_fds=inherited,
            )

    def send(self, pickled: bytes) -> None:
        try:
            self._pipe.send_bytes(pickled)
        except OSError as error:
            raise self._lost() from error

    def receive(self) -> list[EncodedImage]:
        try:
            found, size = self._pipe.recv()
        except (EOFError, OSError) as error:
            raise self._lost() from error
        if self._shared is None or len(self._shared) < size:
            self._shared = mmap.mmap(self._file, size, access=mmap.ACCESS_READ)
        files, start = [], 0
        for height_width, reason, length in found:
            data = self._shared[start : start + length] if not reason else None
            files.append(EncodedImage(data, height_width, reason))
            start += length
        return files

    def end(self) -> None:
        # Killed rather than asked to end: it may be writing an answer that nobody reads any more.
        self._child.terminate()
        self._pipe.close()
        self._child.wait()
        if self._shared is not None:
            self._shared.close()
        os.close(self._file)

    def _lost(self) -> WorkerError:
        return WorkerError(
            "a process that reads images was killed, for lack of memory perhaps: set data.readers lower, "
            "or to 0 for none"
        )


def _serve(pipe: Connection[Any, Any], shared_file: int) -> None:
    """The reading process: receive the datasets, then answer requests until the pipe is closed."""
    datasets = pipe.recv()
    shared = None
    while True:
        try:
            number, indices, max_pixels = pipe.recv()
        except (EOFError, ConnectionResetError):
            return
        files = fetch_images(datasets[number], indices, max_pixels)
        contents = [file.data or b"" for file in files]
        needed = sum(map(len, contents))
        if shared is None or len(shared) < needed:
            size = 2 * needed + mmap.PAGESIZE  # twice as much, so that it seldom has to grow
            os.ftruncate(shared_file, size)
            shared = mmap.mmap(shared_file, size)
        shared.seek(0)
        for content in contents:
            shared.write(content)
        found = [
            (file.height_width, file.reason, len(content))
            for file, content in zip(files, contents, strict=True)
        ]
        pipe.send((found, len(shared)))


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends this one
    _serve(Connection(int(sys.argv[1])), int(sys.argv[2]))
