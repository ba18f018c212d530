"""Turns requests into batches: images are read and decoded in the background, some batches ahead.

Nothing here depends on training or prediction. Each batch in flight has a thread, which mostly waits. A
backend that takes feeds decodes several batches at once, from the sample table; a batch that it refuses is
read in Python and decoded alone, and the files that were the reason go that way from then on. All threads
end with the iterator.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import cache

import numpy as np

from data_pipeline.decode.backend import FeedBackend, ImageBackend
from data_pipeline.decode.resize import Resizer
from data_pipeline.loading.bad_files import FaultLog
from data_pipeline.loading.batches import Batch, BatchRequest, make_batch
from data_pipeline.loading.cache import DecodedCache
from data_pipeline.loading.feeds import FeedMaker, Made
from data_pipeline.loading.readers import EncodedImage, Reader

_POLL_S = 0.1
_LEFT_AFTER_S = 1.0
"""A thread that waits so long for a request, of a pipe that gives none, is left to the end of the process."""
_AHEAD = 3
"""Batches being read or decoded, beside those that are held ready: as many as DALI has in flight."""


def prefetch_batches(
    requests: Iterator[BatchRequest],
    backend: ImageBackend,
    caches: Sequence[DecodedCache] = (),
    *,
    max_pixels: int,
    read_threads: int,
    prefetch: int,
    faults: FaultLog,
) -> Generator[Batch, None, None]:
    """Fulfil requests in order, up to `prefetch` batches ahead of the consumer.

    Args:
        requests: consumed by the background thread.
        backend: decodes.
        caches: decoded pixels; samples that are one of their datasets are not decoded again.
        max_pixels: cap on an image's pixels, by its header.
        read_threads: files read at once in Python, >= 1.
        prefetch: decoded batches held ready, >= 1. As many again, and three, are being decoded.
        faults: logs each bad file once; a file that it excludes is not read again.
    Yields:
        One batch for each request. An error of the background thread is raised here.
        Closing the iterator ends the threads, but one that waits for a request that does not come.
    """
    if read_threads < 1 or prefetch < 1:
        raise ValueError(f"read_threads and prefetch must be at least 1, not {read_threads} and {prefetch}")
    ahead = prefetch + _AHEAD
    ready: queue.Queue[Future[Batch] | BaseException | None] = queue.Queue(maxsize=prefetch + ahead)
    stop = threading.Event()
    requests = _Watched(requests)

    def put(item: Future[Batch] | BaseException | None) -> None:
        while not stop.is_set():  # polled: nothing empties the queue once the consumer has left
            with suppress(queue.Full):
                ready.put(item, timeout=_POLL_S)
                return

    def produce() -> None:
        reader = Reader(read_threads, max_pixels, faults)
        decoder = _Decoder(backend, caches, reader)
        threads = ThreadPoolExecutor(ahead, thread_name_prefix="decode")
        try:
            for request in requests:
                if stop.is_set():
                    return
                put(threads.submit(decoder.decode, request))
            put(None)
        except BaseException as error:  # raised again where the consumer waits
            put(error)
        finally:
            threads.shutdown(cancel_futures=stop.is_set())
            reader.close()
            decoder.close()

    thread = threading.Thread(target=produce, name="prefetch", daemon=True)
    return _consume(ready, stop, thread, faults, requests)


class _Watched(Iterator[BatchRequest]):
    """Requests, with the time for which the next one has been waited for: it may be that of a pipe."""

    def __init__(self, requests: Iterator[BatchRequest]) -> None:
        self._requests = requests
        self._since: float | None = None

    def __next__(self) -> BatchRequest:
        self._since = time.monotonic()
        try:
            return next(self._requests)
        finally:  # at their end, too: then nobody waits for more
            self._since = None

    def seconds_waiting(self) -> float:
        """For how long; 0 while nobody waits."""
        since = self._since
        return 0.0 if since is None else time.monotonic() - since


def _consume(
    ready: queue.Queue[Future[Batch] | BaseException | None],
    stop: threading.Event,
    thread: threading.Thread,
    faults: FaultLog,
    requests: _Watched,
) -> Generator[Batch, None, None]:
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            batch = item.result()
            for failure, place in zip(batch.failures, np.flatnonzero(~batch.valid), strict=True):
                faults.add(failure, batch.paths[int(place)])
            yield batch
    finally:
        stop.set()
        while thread.is_alive() and requests.seconds_waiting() < _LEFT_AFTER_S:
            thread.join(_POLL_S)


class _Decoder:
    """Makes the batches of requests, the fast way or the slow one; any thread may call it."""

    def __init__(self, backend: ImageBackend, caches: Sequence[DecodedCache], reader: Reader) -> None:
        self._backend, self._caches, self._reader = backend, caches, reader
        # it is compiled, which a device that crops does not need
        self._resizer = Resizer() if any(cache.store is not None for cache in caches) else None
        self._fast: FeedBackend | None = backend if backend.takes_feeds else None  # type: ignore[assignment]
        self._feeds = FeedMaker(reader)

    def decode(self, request: BatchRequest) -> Batch:
        for decoded in self._caches:
            if decoded.dataset is request.samples:
                return self._from_cache(request, decoded)
        if (fast := self._fast) is None:
            return self._slowly(request)

        @cache
        def make() -> Made:
            bound = fast.max_batch_bytes
            return self._feeds.make(request.samples, request.indices, request.crop_fn, bound)

        table = request.samples.table
        if table is None or not table.direct[request.indices].all():
            make()  # here, since it waits for files
        images = fast.decode_fast(lambda: make().feed)
        if images is None:
            return self._slowly(request)
        if make().by_pillow:
            fast.log_pillow()
        return make_batch(request, images, make().failures)

    def close(self) -> None:
        self._feeds.close()

    def _from_cache(self, request: BatchRequest, cache: DecodedCache) -> Batch:
        indices = request.indices
        crops = request.crop_fn(np.tile(np.array(cache.size, np.int64), (len(indices), 1)))
        return make_batch(request, cache.images(indices, crops, self._resizer), cache.failures(indices))

    def _slowly(self, request: BatchRequest) -> Batch:
        """Read every file of a batch, and decode them alone, each by what it is now."""
        files = self._reader.fetch(request.samples, request.indices.tolist())
        sizes = np.array([file.height_width for file in files], dtype=np.int64)
        crops = request.crop_fn(sizes)
        if self._fast is not None:
            for place in self._feeds.too_large(sizes, (), self._fast.max_batch_bytes):
                files[place] = self._feeds.cut(files[place], crops, place)
                crops.set_cut(place)
        decoded = self._backend.decode([file.data for file in files], crops)
        reasons = {i: file.reason for i, file in enumerate(files) if file.data is None} | decoded.failures
        if self._fast is not None:
            found = self._remember(request, files, {*reasons, *decoded.transcoded})
            self._fast.distrust_fast(explained=found)
        return make_batch(request, decoded.images, reasons)

    def _remember(self, request: BatchRequest, files: Sequence[EncodedImage], slow: set[int]) -> bool:
        """Note in the table which samples the fast way cannot take; return whether there are any.

        They are those that it does not read, and those that changed since the table was made.
        """
        table = request.samples.table
        if table is None:
            return bool(slow)
        for place, (file, index) in enumerate(zip(files, request.indices.tolist(), strict=True)):
            known = (int(table.lengths[index]), *table.sizes[index].tolist())
            if file.data is not None and known != (len(file.data), *file.height_width):
                slow.add(place)
        table.distrust(request.indices[sorted(slow)])
        return bool(slow)
