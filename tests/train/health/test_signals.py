"""How the ranks agree on a step to stop at."""

from __future__ import annotations

import os
import signal
import time
from contextlib import closing
from functools import partial

import pytest

from train.distributed.world import open_world
from train.health.signals import POLL_S, Interrupt


def test_ranks_poll_about_every_three_seconds() -> None:
    with open_world("cpu") as world, closing(Interrupt()) as interrupt:
        assert interrupt.is_due(1), "the first step is a time to ask: nobody knows yet how long one takes"
        assert not interrupt.poll(world, 1)
        for step_s, steps_between in ((10.0, 1), (0.1, 30), (POLL_S / 300, 300)):
            step = interrupt._next_step
            interrupt._last_time = time.monotonic() - step_s * (step - interrupt._last_step)
            assert not interrupt.poll(world, step)
            assert abs(interrupt._next_step - step - steps_between) <= 0.05 * steps_between
            assert not interrupt.is_due(interrupt._next_step - 1)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_first_signal_is_remembered_while_listening(
    number: signal.Signals, request: pytest.FixtureRequest
) -> None:
    request.addfinalizer(partial(signal.signal, number, signal.signal(number, signal.SIG_DFL)))  # nohup, say
    before = [signal.getsignal(n) for n in (signal.SIGTERM, number)]
    with open_world("cpu") as world, closing(Interrupt()) as interrupt:
        assert [signal.getsignal(n) for n in (signal.SIGTERM, number)] == before
        interrupt.listen()
        assert not interrupt.check_flag(world)
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), signal.SIGTERM)
        assert interrupt.received == number.name
        assert interrupt.check_flag(world) and world.flag_is_set("stop")
        assert interrupt.poll(world, 1)
    assert [signal.getsignal(n) for n in (signal.SIGTERM, number)] == before


def test_ignored_sighup_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with closing(Interrupt()) as interrupt:
            interrupt.listen()
            os.kill(os.getpid(), signal.SIGHUP)
            assert interrupt.received is None
    finally:
        signal.signal(signal.SIGHUP, before)
