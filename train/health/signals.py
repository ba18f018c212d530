"""Being asked to stop: a signal is remembered, and all ranks stop together after the same step."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from train.distributed.world import World

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
"""torchrun's and Kubernetes's, Ctrl-C, Slurm's before a job's time is up, and a terminal that goes away."""

ASK_S = 3.0
"""About so often the ranks ask each other whether to stop; torchrun kills 30 s after passing a signal on."""

TOPIC = "stop"


class Interrupt:
    """Which signal asked this process to stop, if one did, and when the ranks ask each other next."""

    def __init__(self) -> None:
        self.received: str | None = None
        self._before: dict[signal.Signals, signal._HANDLER] = {}
        self._next_step = self._last_step = 0
        self._last_time = time.monotonic()
        self._told = False

    def __bool__(self) -> bool:
        return self.received is not None

    def listen(self) -> None:
        """From now on remember signals instead of dying of them; a second one changes nothing."""

        def remember(number: int, frame: FrameType | None) -> None:
            self.received = self.received or signal.Signals(number).name

        for number in SIGNALS:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue  # nohup
            self._before[number] = signal.signal(number, remember)

    def restore(self) -> None:
        """Handle signals as before `listen`."""
        while self._before:
            signal.signal(*self._before.popitem())

    def is_due(self, step: int) -> bool:
        """Whether the ranks ask each other after this step; the same on all of them."""
        return step >= self._next_step

    def ask(self, world: World, step: int) -> bool:
        """Whether any rank was asked to stop; the same answer on all. Waits for the device.

        Args:
            step: optimiser steps finished; from how long they take follows when to ask again.
        """
        now = time.monotonic()
        seconds = (now - self._last_time) / max(1, step - self._last_step)
        stop, slowest = world.max(float(bool(self)), seconds)
        self._last_time, self._last_step = now, step
        self._next_step = step + max(1, int(ASK_S / max(slowest, 1e-9)))
        return bool(stop)

    def heard(self, world: World) -> bool:
        """Whether this rank, or one that has noticed already, was asked to stop: between collectives."""
        if self and not self._told:
            world.set_flag(TOPIC)
            self._told = True
        return bool(self) or world.flag_is_set(TOPIC)


@contextmanager
def remember_signals() -> Iterator[Interrupt]:
    """An `Interrupt` to `listen` with; the handlers from before come back at the end.

    Only the main thread of a process can do so.
    """
    interrupt = Interrupt()
    try:
        yield interrupt
    finally:
        interrupt.restore()
