"""Maps a function over millions of items in processes, in order, with few items in memory."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice
from typing import TypeVar

from data_pipeline.common.errors import WorkerError
from data_pipeline.common.start import own_initializer

T = TypeVar("T")
R = TypeVar("R")

_AHEAD = 3
"""Items in flight for each process: enough that no process waits for the next."""


def map_ahead(function: Callable[[T], R], items: Iterable[T], workers: int) -> Generator[R, None, None]:
    """`map(function, items)`, in order, in processes of their own; `items` is never consumed as a whole.

    Processes, not threads, since Python's own work for an image lets only one thread run at a time (64-pixel
    JPEGs on two cores: processes decoded about twice as many a second). One worker, or one item, needs none.

    Args:
        function: defined in a module, since processes import it.
        items: each is pickled, and so is its result.
        workers: processes, >= 1.
    Raises:
        WorkerError: a process was killed, for lack of memory most often.
    Returns:
        The results; closing the iterator ends the processes.
    """
    unread = iter(items)
    first = list(islice(unread, 2))
    remaining = chain(first, unread)
    if workers < 2 or len(first) < 2:
        yield from map(function, remaining)
        return
    # spawned, not forked: this process has threads
    context = multiprocessing.get_context("spawn")
    initializer, arguments = own_initializer("data_pipeline.common.workers:follow_parent")
    pool = ProcessPoolExecutor(workers, context, initializer, arguments)
    pending: deque[Future[R]] = deque()
    try:
        pending += (pool.submit(function, item) for item in islice(remaining, _AHEAD * workers))
        while pending:
            yield pending.popleft().result()
            pending += (pool.submit(function, item) for item in islice(remaining, 1))
    except BrokenProcessPool as error:
        raise WorkerError(
            "a worker process was killed, for lack of memory perhaps: use fewer --workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def follow_parent() -> None:
    """Leave Ctrl-C to the parent of this process, and end when the parent does."""
    # Ctrl-C reaches the whole group of processes; the parent ends its workers
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, name="parent", daemon=True).start()


def _end_with_parent() -> None:
    """End this process when its parent was killed: it would wait for work, with its memory, for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
