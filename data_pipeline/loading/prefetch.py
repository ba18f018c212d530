"""Turns requests into batches: files are read ahead and decoded in the background.

Nothing here depends on training or prediction. One pool of threads reads; another decodes two batches at a
time, so that one is resized while the next is decoded. All threads end with the iterator.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from data_pipeline.common.text import printable
from data_pipeline.decode.pillow import Decoded
from data_pipeline.loading.bad_files import Failure, FaultLog
from data_pipeline.loading.readers import EncodedImage, FetchFn, ReaderPool, Samples, fetch_images
from data_pipeline.transforms.crop import CropParams
from data_pipeline.transforms.mix import MixParams
from data_pipeline.transforms.sampler import Int

_POLL_S = 0.1
_DECODING = 2
"""Batches decoded at once: while one is resized, DALI decodes the other."""


class ImageBackend(Protocol):
    """Decodes a batch of encoded files into a batch of crops."""

    name: str
    device: str
    max_batch: int

    def decode(self, encoded: Sequence[bytes | None], crops: CropParams) -> Decoded:
        """Decode up to `max_batch` files; one that fails leaves zeros and its reason, a None leaves zeros."""

    def close(self) -> None:
        """Release threads and memory."""


@dataclass(frozen=True, eq=False)
class Batch:
    """Decoded samples, in order. A sample that failed keeps its place: zeros, and `valid` False.

    Attributes:
        images: (N, crop, crop, 3) uint8 RGB, or (N, 10, crop, crop, 3) for ten crops; any object with
            `__dlpack__`, on the backend's device.
        labels: (N) int64; -1 in prediction.
        valid: (N) bool, which samples were decoded.
        indices: (N) int64, which sample of the dataset (prediction: which of the paths).
        positions: (N) int64, place in the epoch's order (evaluation, prediction: as `indices`).
        paths: (N) the files.
        failures: one for each sample that is not valid, in order.
        step: global step in training; else the number of the batch.
        last: whether this is the last micro-batch of its step.
        mix: how to mix images and labels, without the samples that failed; None for not at all.
    """

    images: Any
    labels: Int
    valid: npt.NDArray[np.bool_]
    indices: Int
    positions: Int
    paths: tuple[Path, ...]
    failures: tuple[Failure, ...]
    step: int
    last: bool
    mix: MixParams | None = None

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, eq=False)
class BatchRequest:
    """The samples of one batch, and how they are cropped. See `Batch` for the fields of the same name.

    Attributes:
        samples: gives the bytes of the `indices`, in this process or in a reading one.
        crop_fn: the crops for the upright sizes, (N, 2), of the N images.
    """

    samples: Samples
    paths: tuple[Path, ...]
    labels: Int
    indices: Int
    positions: Int
    step: int
    last: bool
    crop_fn: Callable[[Int], CropParams]
    mix: MixParams | None = None


def prefetch_batches(
    requests: Iterator[BatchRequest],
    backend: ImageBackend,
    *,
    max_pixels: int,
    read_threads: int,
    prefetch: int,
    faults: FaultLog,
    readers: ReaderPool | None,
) -> Generator[Batch, None, None]:
    """Fulfil requests in order, up to `prefetch` batches ahead of the consumer.

    Args:
        requests: consumed by the background thread.
        backend: decodes.
        max_pixels: cap on an image's pixels, by its header.
        read_threads: files read at once, >= 1.
        prefetch: decoded batches held ready, >= 1. As many again are being read or decoded.
        faults: logs each bad file once; a file that it excludes is not read again.
        readers: processes that read in place of threads, for the samples that they hold.
    Yields:
        One batch for each request. An error of the background thread is raised here.
        Closing the iterator ends the threads.
    """
    if read_threads < 1 or prefetch < 1:
        raise ValueError(f"read_threads and prefetch must be at least 1, not {read_threads} and {prefetch}")
    ready: queue.Queue[Batch | BaseException | None] = queue.Queue(maxsize=prefetch)
    stop = threading.Event()

    def put(item: Batch | BaseException | None) -> None:
        while not stop.is_set():  # polled: nothing empties the queue once the consumer has left
            with suppress(queue.Full):
                ready.put(item, timeout=_POLL_S)
                return

    def produce() -> None:
        reads = _Reads(read_threads, readers, max_pixels, faults)
        decoders = ThreadPoolExecutor(_DECODING, thread_name_prefix="decode")
        ahead = 1 + max(prefetch, 0 if readers is None else readers.num_processes)  # no process runs idle
        batches: deque[Future[Batch]] = deque()
        try:
            for request in requests:
                if stop.is_set():
                    return
                batches.append(decoders.submit(_decode, request, reads.submit(request), backend))
                if len(batches) >= ahead:
                    put(batches.popleft().result())
            while batches and not stop.is_set():
                put(batches.popleft().result())
            put(None)
        except BaseException as error:  # raised again where the consumer waits
            put(error)
        finally:
            reads.close()  # first: a decoder may wait for a read, which this completes or cancels
            decoders.shutdown(cancel_futures=True)

    thread = threading.Thread(target=produce, name="prefetch", daemon=True)
    return _consume(ready, stop, thread, faults)


def _consume(
    ready: queue.Queue[Batch | BaseException | None],
    stop: threading.Event,
    thread: threading.Thread,
    faults: FaultLog,
) -> Generator[Batch, None, None]:
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            for failure, place in zip(item.failures, np.flatnonzero(~item.valid), strict=True):
                faults.add(failure, item.paths[place])
            yield item
    finally:
        stop.set()
        thread.join()


class _Reads:
    """Reads the files of requests, in threads.

    Requests for samples that reading processes hold go to those, whole; a thread for each waits for it.
    """

    def __init__(
        self, read_threads: int, readers: ReaderPool | None, max_pixels: int, faults: FaultLog
    ) -> None:
        self._threads = read_threads if readers is None else readers.num_processes
        self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="read")
        self._readers, self._max_pixels, self._faults = readers, max_pixels, faults

    def submit(self, request: BatchRequest) -> list[Future[list[EncodedImage]]]:
        """Begin to read a request's files; the futures give shares of them, in order."""
        count, fetch = len(request.paths), fetch_images
        share = max(1, -(-count // (2 * self._threads)))  # files of one task: handing one over costs time too
        if self._readers is not None and self._readers.holds(request.samples):
            share, fetch = count, self._readers.fetch
        return [
            self._pool.submit(self._fetch, request, slice(first, first + share), fetch)
            for first in range(0, count, share)
        ]

    def _fetch(self, request: BatchRequest, share: slice, fetch: FetchFn) -> list[EncodedImage]:
        """Some files of a request; those that are excluded are not read."""
        reasons = [self._faults.reason_for(path) for path in request.paths[share]]
        wanted = request.indices[share][[reason is None for reason in reasons]]
        fetched = iter(fetch(request.samples, wanted, self._max_pixels))
        return [next(fetched) if reason is None else EncodedImage(None, reason=reason) for reason in reasons]

    def close(self) -> None:
        """End the threads, once the reads that have begun are done."""
        self._pool.shutdown(cancel_futures=True)


def _decode(request: BatchRequest, reads: list[Future[list[EncodedImage]]], backend: ImageBackend) -> Batch:
    files = [file for share in reads for file in share.result()]
    sizes = np.array([file.height_width for file in files], dtype=np.int64)
    decoded = backend.decode([file.data for file in files], request.crop_fn(sizes))
    reasons = {i: file.reason for i, file in enumerate(files) if file.data is None} | decoded.failures
    valid = np.ones(len(files), dtype=bool)
    valid[list(reasons)] = False
    return Batch(
        images=decoded.images,
        labels=request.labels,
        valid=valid,
        indices=request.indices,
        positions=request.positions,
        paths=request.paths,
        failures=tuple(Failure(printable(request.paths[i]), reasons[i]) for i in sorted(reasons)),
        step=request.step,
        last=request.last,
        mix=None if request.mix is None else request.mix.drop_invalid(valid),
    )
