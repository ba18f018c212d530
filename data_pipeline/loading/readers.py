"""Reads encoded images and their headers, image by image, in threads.

This is for images of which no sample table tells the size: those of a prediction, and the few of a training
set that a decoder does not read. Python's own work for a file holds the interpreter for about 0.06 ms, so
that any number of threads reads some 15,000 images a second together.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from data_pipeline.common.errors import ImageError
from data_pipeline.datasets.sample_table import SampleTable
from data_pipeline.decode.header import read_header
from data_pipeline.loading.bad_files import FaultLog

# A file larger than the largest image that we accept, uncompressed in four channels of 16 bits, is not read.
MAX_BYTES_PER_PIXEL = 8


@dataclass(frozen=True)
class EncodedImage:
    """One file's bytes and upright size; or None, with the reason why it cannot be used."""

    data: bytes | None
    height_width: tuple[int, int] = (1, 1)
    reason: str = ""


class Samples(Protocol):
    """Encoded images by index, such as those of a `Dataset`. Threads may read at the same time.

    Attributes:
        table: what is known of the images; None if nothing is.
    """

    @property
    def table(self) -> SampleTable | None: ...

    def path_at(self, index: int) -> Path:
        """The path of one image, for messages."""

    def read(self, index: int, max_bytes: int) -> bytes:
        """The bytes of one image, at most so many; raises `ImageError`."""


class Reader:
    """Reads images in threads; a bad file that is known already is not read again.

    Args:
        num_threads: files read at once, >= 1.
        max_pixels: cap on an image's pixels, by its header.
        faults: knows the bad files.
    """

    def __init__(self, num_threads: int, max_pixels: int, faults: FaultLog) -> None:
        self.max_pixels = max_pixels
        self.pool = ThreadPoolExecutor(num_threads, thread_name_prefix="read")
        self._num_threads, self._faults = num_threads, faults

    def fetch(self, samples: Samples, indices: Sequence[int]) -> list[EncodedImage]:
        """Read images and their headers, in order."""
        share = max(1, -(-len(indices) // (2 * self._num_threads)))  # handing one over costs time too
        shares = [indices[first : first + share] for first in range(0, len(indices), share)]
        parts = self.pool.map(lambda part: [self._read(samples, index) for index in part], shares)
        return [image for part in parts for image in part]

    def close(self) -> None:
        """End the threads, once the reads that have begun are done."""
        self.pool.shutdown(cancel_futures=True)

    def _read(self, samples: Samples, index: int) -> EncodedImage:
        reason = self._faults.reason_for(samples.path_at(index))
        if reason is not None:
            return EncodedImage(None, reason=reason)
        try:
            data = samples.read(index, MAX_BYTES_PER_PIXEL * self.max_pixels)
            return EncodedImage(data, read_header(data, self.max_pixels))
        except ImageError as error:
            return EncodedImage(None, reason=str(error))
