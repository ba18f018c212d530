"""Keeps a DALI graph busy: batches are fed ahead by a thread of its own, so that decoding never waits."""

from __future__ import annotations

import queue
import threading
from collections import deque
from concurrent.futures import Future
from typing import Any

import numpy as np
import numpy.typing as npt

from data_pipeline.decode.dali_graph import Graph, GraphSpec, Place
from data_pipeline.decode.feed import Feed

Output = tuple[Any, npt.NDArray[np.int64] | None]
"""What `Graph.pop` returns."""


class GraphQueue:
    """A graph and its thread, which feeds batches as they come and hands out their results.

    Args:
        spec: the graph.
        place: where it runs.
    Raises:
        RuntimeError: DALI cannot run it here.
    """

    def __init__(self, spec: GraphSpec, place: Place) -> None:
        self._graph = Graph(spec, place)
        self._feeds: queue.SimpleQueue[tuple[Feed, Future[Output]] | None] = queue.SimpleQueue()
        self._closed = False
        self._lock = threading.Lock()  # only between closing and a feed that comes too late
        self._thread = threading.Thread(target=self._serve, name="dali", daemon=True)
        self._thread.start()

    def submit(self, feed: Feed) -> Future[Output]:
        """Decode a batch; any thread may call this.

        Returns:
            The result; its exception is a RuntimeError where DALI refuses the batch.
        """
        future: Future[Output] = Future()
        with self._lock:
            if self._closed:
                raise RuntimeError("the decoder is closed")
            self._feeds.put((feed, future))
        return future

    def close(self) -> None:
        """End the thread, once the batches that were fed are decoded."""
        with self._lock:
            self._closed = True
            self._feeds.put(None)
        self._thread.join()

    def _serve(self) -> None:
        in_flight: deque[tuple[Feed, Future[Output]]] = deque()  # keeps the feeds: DALI reads their memory
        more = True
        while more or in_flight:
            try:
                item = self._feeds.get(block=not in_flight) if more else None
            except queue.Empty:
                self._finish_oldest(in_flight)
                continue
            if item is None:
                more = False
                while in_flight:
                    self._finish_oldest(in_flight)
                continue
            feed, future = item
            try:
                self._graph.push(feed)
            except Exception as error:  # the waiting thread raises it
                future.set_exception(error)
                continue
            in_flight.append(item)
            if len(in_flight) >= self._graph.spec.depth:
                self._finish_oldest(in_flight)

    def _finish_oldest(self, in_flight: deque[tuple[Feed, Future[Output]]]) -> None:
        _, future = in_flight[0]
        try:
            result = self._graph.pop()
        except Exception as error:  # the waiting thread raises it
            future.set_exception(error)
        else:
            future.set_result(result)
        in_flight.popleft()
