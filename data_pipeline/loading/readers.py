"""Reading encoded images and their headers, in this process or in processes of their own.

What Python does around each file holds the interpreter for about a tenth of a millisecond: threads read some
8,000 images a second together, however many they are. That feeds a CPU many times over, but not a GPU that
decodes; there, processes read, and this one only takes over their bytes, a batch at a time.

The processes run `python -m data_pipeline.loading.readers`, not multiprocessing: that would import the
main module, and with it torch, in each of them.
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
from contextlib import suppress
from dataclasses import dataclass
from typing import IO, Any, Protocol

from data_pipeline.common.errors import ImageError, WorkerError
from data_pipeline.decode.pillow import read_header
from data_pipeline.transforms.sampler import Int

# No file need be larger than the largest image that we accept, uncompressed, in four channels of 16 bits.
MAX_BYTES_PER_PIXEL = 8
_LENGTH_BYTES = 8


@dataclass(frozen=True)
class EncodedImage:
    """One file's bytes and upright size; or, without bytes, the reason why there are none."""

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
    """Processes that read samples of some datasets; as many threads may ask at once as there are processes.

    Each process holds the datasets' index once more: 40 MB for ImageNet's training set.

    Args:
        datasets: what may be asked for.
        num_processes: how many, >= 1.
    """

    def __init__(self, datasets: Sequence[Samples], num_processes: int) -> None:
        self.num_processes = num_processes
        self._datasets = tuple(datasets)
        self._idle: queue.SimpleQueue[_Process] = queue.SimpleQueue()
        self._processes = [_Process() for _ in range(num_processes)]
        index = pickle.dumps(self._datasets)
        for process in self._processes:  # all start at once, and take in the index side by side
            process.send(index)
            self._idle.put(process)

    def holds(self, samples: Samples) -> bool:
        """Whether these are one of the pool's datasets."""
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
    """One reading process: what is asked and answered through pipes, the contents in shared memory."""

    def __init__(self) -> None:
        self._file = os.memfd_create("images")
        self._shared: mmap.mmap | None = None
        self._child = subprocess.Popen(
            [sys.executable, "-m", "data_pipeline.loading.readers", str(self._file)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=[self._file],
        )
        assert self._child.stdin is not None and self._child.stdout is not None
        self._in, self._out = self._child.stdin, self._child.stdout

    def send(self, content: bytes) -> None:
        try:
            _write_frame(self._in, content)
        except OSError as error:
            raise self._lost() from error

    def receive(self) -> list[EncodedImage]:
        try:
            found, size = pickle.loads(_read_frame(self._out))
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
        # It may be writing an answer that nobody wants any more, so it is not waited for.
        self._child.terminate()
        for pipe in (self._in, self._out):
            with suppress(OSError):  # what was still to be written has no reader
                pipe.close()
        self._child.wait()
        if self._shared is not None:
            self._shared.close()
        os.close(self._file)

    def _lost(self) -> WorkerError:
        return WorkerError(
            "a process that reads images was killed, for lack of memory perhaps: set data.readers lower, "
            "or to 0 for none"
        )


def _write_frame(stream: IO[bytes], content: bytes) -> None:
    stream.write(len(content).to_bytes(_LENGTH_BYTES, "little"))
    stream.write(content)
    stream.flush()


def _read_frame(stream: IO[bytes]) -> bytes:
    length = stream.read(_LENGTH_BYTES)
    content = stream.read(int.from_bytes(length, "little"))
    if len(length) < _LENGTH_BYTES or len(content) < int.from_bytes(length, "little"):
        raise EOFError
    return content


def _serve(requests: IO[bytes], answers: IO[bytes], shared_file: int) -> None:
    """Be a reading process: the datasets first, then an answer to each request, until there are no more."""
    datasets: Any = pickle.loads(_read_frame(requests))
    shared = None
    while True:
        try:
            number, indices, max_pixels = pickle.loads(_read_frame(requests))
        except EOFError:
            return
        files = fetch_images(datasets[number], indices, max_pixels)
        contents = [file.data or b"" for file in files]
        needed = sum(map(len, contents))
        if shared is None or len(shared) < needed:
            size = 2 * needed + mmap.PAGESIZE  # room for larger batches, so that it seldom grows
            os.ftruncate(shared_file, size)
            shared = mmap.mmap(shared_file, size)
        start = 0
        for content in contents:
            shared[start : start + len(content)] = content
            start += len(content)
        found = [
            (file.height_width, file.reason, len(content))
            for file, content in zip(files, contents, strict=True)
        ]
        _write_frame(answers, pickle.dumps((found, len(shared))))


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that started this one sees to it
    _serve(sys.stdin.buffer, sys.stdout.buffer, int(sys.argv[1]))
