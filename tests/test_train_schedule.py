"""The learning rate at every step."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.config import ScheduleConfig
from train.schedule import lr_at


def rates(schedule: ScheduleConfig, *, steps_per_epoch: int, epochs: int) -> list[float]:
    total = steps_per_epoch * epochs
    return [lr_at(s, schedule, steps_per_epoch=steps_per_epoch, total_steps=total) for s in range(total)]


def test_step_schedule_divides_at_the_milestones() -> None:
    schedule = ScheduleConfig(learning_rate=0.01, kind="step", milestones=(30.0, 60.0, 80.0))
    found = rates(schedule, steps_per_epoch=2, epochs=90)
    assert found[:60] == [0.01] * 60
    assert found[60:120] == pytest.approx([0.001] * 60)
    assert found[120:160] == pytest.approx([1e-4] * 40)
    assert found[160:] == pytest.approx([1e-5] * 20)


def test_warm_up_is_linear_from_a_hundredth() -> None:
    schedule = ScheduleConfig(learning_rate=1.0, kind="constant", warmup_epochs=1.0)
    found = rates(schedule, steps_per_epoch=4, epochs=2)
    assert found == pytest.approx([0.01, 0.2575, 0.505, 0.7525, 1.0, 1.0, 1.0, 1.0])


def test_cosine_halves_in_the_middle_and_ends_near_nothing() -> None:
    found = rates(ScheduleConfig(learning_rate=1.0, kind="cosine"), steps_per_epoch=10, epochs=10)
    assert found[0] == 1.0
    assert found[50] == pytest.approx(0.5)
    assert 0 < found[-1] < 0.001


@given(
    kind=st.sampled_from(["step", "cosine", "constant"]),
    warmup=st.floats(0, 3),
    steps_per_epoch=st.integers(1, 50),
    epochs=st.integers(1, 20),
)
def test_every_rate_is_positive_and_at_most_the_base(
    kind: str, warmup: float, steps_per_epoch: int, epochs: int
) -> None:
    schedule = ScheduleConfig(learning_rate=0.1, kind=kind, warmup_epochs=warmup, milestones=(2.0, 5.0))  # type: ignore[arg-type]
    found = rates(schedule, steps_per_epoch=steps_per_epoch, epochs=epochs)
    assert all(0 < rate <= 0.1 for rate in found)
