"""Work that is done again and again on the same tensors: captured once and replayed, or run every time.

Source: PyTorch, "CUDA semantics", section "CUDA Graphs" (capturing a whole network: warm-up on a stream
beside, then the capture, with gradients in the graph's own memory).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

Work = Callable[[], None]
"""Reads and writes tensors whose memory stays where it is, and looks at no value on the host."""
Capture = Callable[[Work], Work]
"""A way to do work many times: returns what does the work once at each call, if only by running it."""

WARM_UP = 3
"""Calls in which a work is run as it is, for its effects, before the one that captures it: libraries choose
kernels, make handles and load code when they are first used."""


class CudaCapture:
    """A `Capture` by CUDA graphs, all with one pool of memory: they are replayed one after another."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, work: Work) -> Work:
        """Return the work, which becomes a graph in the call after the warm-up."""
        return _Graph(self, work)


class _Graph:
    """The calls of one work."""

    def __init__(self, owner: CudaCapture, work: Work) -> None:
        self._owner, self._work, self._calls = owner, work, 0
        self._graph = torch.cuda.CUDAGraph()

    def __call__(self) -> None:
        self._calls += 1
        if self._calls <= WARM_UP:
            self._run_beside()
            return
        if self._calls == WARM_UP + 1:
            # Other threads, a decoder's or NCCL's, may do what a capture does not allow in this one.
            with torch.cuda.graph(
                self._graph,
                pool=self._owner.pool,
                stream=self._owner.stream,
                capture_error_mode="thread_local",
            ):
                self._work()
        self._graph.replay()

    def _run_beside(self) -> None:
        stream, current = self._owner.stream, torch.cuda.current_stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            self._work()
        current.wait_stream(stream)
