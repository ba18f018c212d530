"""Keeps DALI busy: a thread of its own feeds batches ahead, so that decoding never waits for them."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, NamedTuple

from data_pipeline.decode.dali_graph import Graph
from data_pipeline.decode.feed import Feed


class Output(NamedTuple):
    """A decoded batch: its feed, and whether each file is of the size that the feed says."""

    feed: Feed
    images: Any
    as_known: bool


class GraphQueue:
    """A thread that plans batches, feeds them to their graphs as they come, and hands out the results.

    One thread does all of it, since threads that share this work wait for the interpreter in turns.

    Args:
        graph_of: gives the graph of a feed, whose depth bounds the batches in flight; called in the thread.
    """

    def __init__(self, graph_of: Callable[[Feed], Graph]) -> None:
        self._graph_of = graph_of
        self._plans: queue.SimpleQueue[tuple[Callable[[], Feed], Future[Output]] | None] = queue.SimpleQueue()
        # each with its feed, whose memory DALI reads
        self._in_flight: deque[tuple[Graph, Feed, Future[Output]]] = deque()
        self._closed = False
        self._lock = threading.Lock()  # only between closing and a batch that comes too late
        self._thread = threading.Thread(target=self._serve, name="dali", daemon=True)
        self._thread.start()

    def submit(self, plan: Callable[[], Feed]) -> Future[Output]:
        """Decode a batch; any thread may call this.

        Args:
            plan: makes its feed.
        Returns:
            The result; its exception is that of `plan`, or a RuntimeError where DALI refuses the batch.
        """
        future: Future[Output] = Future()
        with self._lock:
            if self._closed:
                raise RuntimeError("the decoder is closed")
            self._plans.put((plan, future))
        return future

    def close(self) -> None:
        """End the thread, once the batches that were submitted are decoded."""
        with self._lock:
            self._closed = True
            self._plans.put(None)
        self._thread.join()

    def _serve(self) -> None:
        while True:
            try:
                item = self._plans.get(block=not self._in_flight)
            except queue.Empty:
                self._finish_oldest()
                continue
            if item is None:
                break
            plan, future = item
            try:
                feed = plan()
                graph = self._graph_of(feed)
                graph.push(feed)
            except Exception as error:  # the waiting thread raises it
                future.set_exception(error)
                continue
            self._in_flight.append((graph, feed, future))
            if len(self._in_flight) >= graph.spec.depth:
                self._finish_oldest()
        while self._in_flight:
            self._finish_oldest()

    def _finish_oldest(self) -> None:
        graph, feed, future = self._in_flight[0]
        try:
            images, sizes = graph.pop()
            future.set_result(Output(feed, images, sizes is None or bool((sizes == feed.sizes).all())))
        except Exception as error:  # the waiting thread raises it
            future.set_exception(error)
        self._in_flight.popleft()
