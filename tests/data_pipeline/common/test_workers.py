"""Work in processes: in order, taken as it is needed, and a killed worker is one line."""

from __future__ import annotations

import os
from typing import Any

import pytest

from data_pipeline.common.errors import WorkerError
from data_pipeline.common.workers import map_ahead


def kill_on_three(number: int) -> int:
    if number == 3:
        os.kill(os.getpid(), 9)
    return number


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
