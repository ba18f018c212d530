"""Stop signals: a handler remembers the signal, and all ranks stop together after the same step."""

from __future__ import annotations

import signal
import time
from types import FrameType

from train.distributed.world import World

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
"""From torchrun and Kubernetes, Ctrl-C, Slurm before a job's time is up, and a terminal that closes."""

POLL_S = 3.0
"""About how often the ranks agree on whether to stop; torchrun kills 30 s after passing a signal on."""

FLAG = "stop"


class Interrupt:
    """Remembers the first signal to this process, and schedules when the ranks agree on whether to stop.

    Only the main thread of a process can install handlers.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._before: dict[signal.Signals, signal._HANDLER] = {}
        self._next_step = self._last_step = 0
        self._last_time = time.monotonic()

    def listen(self) -> None:
        """Install handlers that remember a signal instead of ending the process; a second one is ignored."""

        def remember(number: int, frame: FrameType | None) -> None:
            self.received = self.received or signal.Signals(number).name

        for number in SIGNALS:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue  # under nohup a closing terminal must not stop the run
            self._before[number] = signal.signal(number, remember)

    def close(self) -> None:
        """Restore the handlers from before `listen`."""
        while self._before:
            signal.signal(*self._before.popitem())

    def is_due(self, step: int) -> bool:
        """Return whether to `poll` after this step; the same on all ranks."""
        return step >= self._next_step

    def poll(self, world: World, step: int) -> bool:
        """Return whether any rank received a signal, on all ranks; a collective. Waits for the device.

        Args:
            step: optimiser steps finished; the time they take decides when the next poll is due.
        """
        now = time.monotonic()
        seconds = (now - self._last_time) / max(1, step - self._last_step)
        stop, slowest = world.max(float(self.received is not None), seconds)
        self._last_time, self._last_step = now, step
        self._next_step = step + max(1, int(POLL_S / max(slowest, 1e-9)))
        return bool(stop)

    def check_flag(self, world: World) -> bool:
        """Return whether this rank received a signal, or another one flagged that it did; no collective."""
        if self.received is not None:
            world.set_flag(FLAG)
        return self.received is not None or world.flag_is_set(FLAG)
