"""Takes over images from a decoder on the same GPU, which knows nothing of torch's stream."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor


class Event(Protocol):
    """A point in the device's queue of work, as `torch.cuda.Event`."""

    def record(self) -> None: ...

    def query(self) -> bool: ...


class Lender:
    """Copies tensors whose memory another library frees and uses again as soon as nobody refers to it.

    The kernel that reads them may run long after that: the host is ahead of the device. So they are kept
    until the copy is made, and nobody waits.

    Args:
        make_event: makes the events.
    """

    def __init__(self, make_event: Callable[[], Event] = torch.cuda.Event) -> None:
        self._make_event = make_event
        self._kept: deque[tuple[Event, Tensor]] = deque()

    def take_over(self, tensor: Tensor) -> Tensor:
        """Return a copy of a tensor in memory of torch's own, made on the current stream."""
        while self._kept and self._kept[0][0].query():
            self._kept.popleft()
        copy, event = tensor.clone(), self._make_event()
        event.record()
        self._kept.append((event, tensor))
        return copy


@lru_cache(maxsize=8)
def lender_of(device: torch.device) -> Lender:
    """The lender of a GPU."""
    del device
    return Lender()
