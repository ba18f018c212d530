"""Work in processes: in order, taken as it is needed, and a killed worker is one line."""

from __future__ import annotations

import multiprocessing
import os
import time
from multiprocessing.connection import Connection
from typing import Any

import pytest

from data_pipeline.common.errors import WorkerError
from data_pipeline.common.workers import map_ahead
from tests.helpers.processes import lives


def kill_on_three(number: int) -> int:
    if number == 3:
        os.kill(os.getpid(), 9)
    return number


@pytest.mark.slow
def test_killed_worker_is_one_error_line() -> None:
    with pytest.raises(WorkerError, match=r"a worker process was killed, .*: use fewer --workers"):
        list(map_ahead(kill_on_three, range(6), 2))


def test_worker_pool_is_lazy_and_keeps_the_order() -> None:
    taken: list[int] = []

    def numbers() -> Any:
        for number in range(100):
            taken.append(number)
            yield -number

    results = map_ahead(abs, numbers(), 2)
    assert [next(results) for _ in range(5)] == [0, 1, 2, 3, 4]
    assert len(taken) <= 5 + 6
    results.close()
    assert list(map_ahead(abs, [-1, -2], 1)) == [1, 2] and list(map_ahead(abs, [], 2)) == []


def be_parent(pipe: Connection) -> None:
    """Tell the numbers of two workers that wait for work."""
    results = map_ahead(abs, range(100), 2)
    next(results)
    pipe.send([process.pid for process in multiprocessing.active_children()])
    pipe.recv()


@pytest.mark.slow
def test_workers_end_with_a_parent_that_is_killed() -> None:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=be_parent, args=(theirs,))
    process.start()
    workers = ours.recv()
    assert len(workers) == 2 and all(map(lives, workers))
    process.kill()
    process.join()
    end = time.monotonic() + 10
    while any(map(lives, workers)):
        assert time.monotonic() < end, "they wait for work that never comes"
        time.sleep(0.02)
    process.close()
    ours.close()
    theirs.close()
