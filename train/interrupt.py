"""Being asked to stop: a signal is remembered, and all ranks stop together at the next row."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""torchrun's and Kubernetes's, Ctrl-C, and Slurm's before a job's time is up."""


class Interrupt:
    """Which signal asked this process to stop, if one did."""

    def __init__(self) -> None:
        self.received: str | None = None

    def __bool__(self) -> bool:
        return self.received is not None


@contextmanager
def remember_signals() -> Iterator[Interrupt]:
    """Remember the signals that ask to stop instead of dying of them; a second one changes nothing.

    Only the main thread of a process can do so; the handlers from before come back at the end.
    """
    interrupt = Interrupt()

    def remember(number: int, frame: FrameType | None) -> None:
        interrupt.received = interrupt.received or signal.Signals(number).name

    before = {number: signal.signal(number, remember) for number in SIGNALS}
    try:
        yield interrupt
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
