"""The loader's engine: requests in, batches out; files read ahead, decoding in the background.

Knows nothing of training or prediction. A pool reads, another decodes two batches at a time, so that one
resizes while the next is decoded; all threads end with the iterator.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from data_pipeline.common.text import printable
from data_pipeline.datasets.dataset import Dataset
from data_pipeline.decode.pillow import Decoded
from data_pipeline.loading.bad_files import Failure, FaultLog
from data_pipeline.loading.readers import EncodedImage, ReaderPool, fetch
from data_pipeline.transforms.crop import CropParams
from data_pipeline.transforms.mix import MixParams
from data_pipeline.transforms.sampler import Int

_POLL_S = 0.1
_DECODING = 2


class ImageBackend(Protocol):
    """Turns a batch of encoded files into a batch of crops."""

    name: str
    device: str
    max_batch: int

    def decode(self, encoded: Sequence[bytes | None], geometry: CropParams) -> Decoded:
        """Decode up to `max_batch` files; one that fails leaves zeros and its reason, a None leaves zeros."""

    def close(self) -> None:
        """Release threads and memory."""


@dataclass(frozen=True, eq=False)
class Batch:
    """Decoded samples, in order. A sample that failed keeps its place: zeros, and `valid` False.

    Args:
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
        mix: how the images and labels are to be mixed, with failed samples left out; None for not at all.
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
    """What one batch shall hold: files, and the recipe for their sizes. See `Batch` for the shared fields.

    Args:
        paths: (N) the files, as messages name them.
        read: gives the bytes of the file at a place 0..N - 1, of at most so many bytes; raises `ImageError`.
        geometry: recipes for the upright sizes of the N files.
        dataset: where the `indices` are; None for images that are in none.
    """

    paths: tuple[Path, ...]
    read: Callable[[int, int], bytes]
    labels: Int
    indices: Int
    positions: Int
    step: int
    last: bool
    geometry: Callable[[Int], CropParams]
    mix: MixParams | None = None
    dataset: Dataset | None = None


def prefetch_batches(
    requests: Iterator[BatchRequest],
    backend: ImageBackend,
    max_pixels: int,
    read_threads: int,
    prefetch: int,
    faults: FaultLog | None,
    readers: ReaderPool | None = None,
) -> Generator[Batch, None, None]:
    """Fulfil requests in order, up to `prefetch` batches ahead of the consumer.

    Args:
        requests: consumed by the background thread.
        backend: decodes.
        max_pixels: cap on an image's pixels, by its header.
        read_threads: files read at once, >= 1.
        prefetch: decoded batches held ready, >= 1. Two more are being decoded, and as many again read.
        faults: names bad files once; None for a log of this iterator's own.
        readers: processes that read in place of threads, what is in their datasets.
    Yields:
        One batch for each request. An error of the background thread is raised here.
        Closing the iterator ends the threads.
    """
    if read_threads < 1 or prefetch < 1:
        raise ValueError(f"read_threads and prefetch must be at least 1, not {read_threads} and {prefetch}")
    ready: queue.Queue[Batch | BaseException | None] = queue.Queue(maxsize=prefetch)
    stop = threading.Event()
    faults = FaultLog() if faults is None else faults

    def put(item: Batch | BaseException | None) -> None:
        while not stop.is_set():
            with suppress(queue.Full):
                ready.put(item, timeout=_POLL_S)
                return

    def produce() -> None:
        threads = read_threads if readers is None else readers.num_processes
        pool = ThreadPoolExecutor(threads, thread_name_prefix="read")
        decoders = ThreadPoolExecutor(_DECODING, thread_name_prefix="decode")
        decoding: deque[Future[Batch]] = deque()
        try:
            for request, fetched in _read_ahead(
                requests, pool, threads, readers, max_pixels, prefetch, faults
            ):
                if stop.is_set():
                    return
                decoding.append(decoders.submit(_decode, request, fetched, backend))
                if len(decoding) >= _DECODING:
                    put(decoding.popleft().result())
            while decoding and not stop.is_set():
                put(decoding.popleft().result())
            put(None)
        except BaseException as error:  # raised again where the consumer waits
            put(error)
        finally:
            pool.shutdown(cancel_futures=True)
            decoders.shutdown(cancel_futures=True)

    thread = threading.Thread(target=produce, name="decode", daemon=True)
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
                faults.add(failure)
                faults.exclude(item.paths[place], failure.reason)
            yield item
    finally:
        stop.set()
        thread.join()


def _fetch(request: BatchRequest, places: range, max_pixels: int, faults: FaultLog) -> list[EncodedImage]:
    """Some files of a request by one thread, but for those in quarantine: a hand-over each costs more."""
    files = []
    for place in places:
        if (reason := faults.reason_for(request.paths[place])) is not None:
            files.append(EncodedImage(None, reason=reason))
        else:
            files.append(fetch(partial(request.read, place), max_pixels))
    return files


def _fetch_all(
    request: BatchRequest, readers: ReaderPool, max_pixels: int, faults: FaultLog
) -> list[EncodedImage]:
    """All files of a request by one process, but for those in quarantine."""
    assert request.dataset is not None
    files = [EncodedImage(None, reason=faults.reason_for(path) or "") for path in request.paths]
    wanted = [place for place, file in enumerate(files) if not file.reason]
    for place, file in zip(
        wanted, readers.fetch(request.dataset, request.indices[wanted], max_pixels), strict=True
    ):
        files[place] = file
    return files


def _read_ahead(
    requests: Iterator[BatchRequest],
    pool: ThreadPoolExecutor,
    read_threads: int,
    readers: ReaderPool | None,
    max_pixels: int,
    depth: int,
    faults: FaultLog,
) -> Iterator[tuple[BatchRequest, list[EncodedImage]]]:
    pending: deque[tuple[BatchRequest, list[Future[list[EncodedImage]]]]] = deque()
    depth = max(depth, 0 if readers is None else readers.num_processes)
    for request in requests:
        if readers is not None and readers.holds(request.dataset):
            futures = [pool.submit(_fetch_all, request, readers, max_pixels, faults)]
        else:
            count = len(request.paths)
            few = max(1, -(-count // (2 * read_threads)))
            shares = [range(first, min(first + few, count)) for first in range(0, count, few)]
            futures = [pool.submit(_fetch, request, share, max_pixels, faults) for share in shares]
        pending.append((request, futures))
        if len(pending) >= depth:
            yield _fetched(*pending.popleft())
    while pending:
        yield _fetched(*pending.popleft())


def _fetched(
    request: BatchRequest, futures: list[Future[list[EncodedImage]]]
) -> tuple[BatchRequest, list[EncodedImage]]:
    return request, [file for future in futures for file in future.result()]


def _decode(request: BatchRequest, fetched: Sequence[EncodedImage], backend: ImageBackend) -> Batch:
    sizes = np.array([file.height_width for file in fetched], dtype=np.int64)
    decoded = backend.decode([file.data for file in fetched], request.geometry(sizes))
    reasons = {i: file.reason for i, file in enumerate(fetched) if file.data is None} | decoded.failures
    valid = np.ones(len(fetched), dtype=bool)
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
        mix=None if request.mix is None else request.mix.where(valid),
    )
