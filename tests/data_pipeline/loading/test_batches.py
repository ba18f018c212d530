"""Micro-batches in training: which of them make a step."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from data_pipeline.loading.batches import Batch, group_by_step


def test_step_is_given_when_its_last_batch_is_there() -> None:
    read: list[int] = []

    def batches() -> Iterator[Batch]:
        for number, last in enumerate([False, False, True, True, False, True, False]):
            read.append(number)
            places = np.array([number])
            yield Batch(None, places, np.ones(1, bool), places, places, (), (), step=0, last=last)

    steps = group_by_step(batches())
    assert [int(batch.labels[0]) for batch in next(steps)] == [0, 1, 2] and read == [0, 1, 2]
    assert [len(step) for step in steps] == [1, 2] and read[-1] == 6, "an open end is no step"
