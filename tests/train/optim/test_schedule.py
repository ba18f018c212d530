"""The learning rate at every step."""

from __future__ import annotations

import itertools

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.config.schedule import ScheduleConfig
from train.optim.schedule import base_lr_for, describe_lr, lr_at, plateau_drops


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


def test_cosine_schedule_halves_in_the_middle_and_ends_near_0() -> None:
    found = rates(ScheduleConfig(learning_rate=1.0, kind="cosine"), steps_per_epoch=10, epochs=10)
    assert found[0] == 1.0
    assert found[50] == pytest.approx(0.5)
    assert 0 < found[-1] < 0.001


def test_poly_schedule_is_the_authors_policy() -> None:
    schedule = ScheduleConfig(learning_rate=32.0, kind="poly", power=2.0, warmup_epochs=1.0, warmup_start=0.5)
    found = rates(schedule, steps_per_epoch=2, epochs=6)
    assert found[:2] == [16.0, 24.0]
    assert found[2:] == pytest.approx([32 * (1 - n / 10) ** 2 for n in range(10)])


@pytest.mark.parametrize(
    ("scaling", "batch", "expected"),
    [("none", 32768, 2.0), ("linear", 32768, 128.0), ("sqrt", 32768, 16.0), ("linear", 256, 1.0)],
)
def test_learning_rate_scales_with_the_batch(scaling: str, batch: int, expected: float) -> None:
    schedule = ScheduleConfig(learning_rate=2.0, scaling=scaling, reference_batch=512, kind="constant")  # type: ignore[arg-type]
    base = base_lr_for(schedule, batch)
    assert base == expected
    scaled = msgspec.structs.replace(schedule, learning_rate=base)
    assert lr_at(3, scaled, steps_per_epoch=10, total_steps=100) == expected
    said = describe_lr(schedule, batch)
    assert said.startswith(f"learning rate {expected:g}") and said.endswith(", constant")
    assert ("(2 for a batch of 512, scaled " in said) is (scaling != "none")


PLATEAU = ScheduleConfig(kind="plateau", patience=3, min_improvement=0.01, learning_rate=0.01)


@pytest.mark.parametrize(
    ("errors", "drops"),
    [
        ([], 0),
        ([0.9, 0.8, 0.7], 0),
        ([0.9, 0.895, 0.891], 0),
        ([0.9, 0.895, 0.895, 0.895], 1),
        ([0.9, 0.9, 0.9, 0.89, 0.9, 0.9], 0),  # one just in time
        ([0.9] * 7, 2),
        ([0.9] * 4 + [0.5] + [0.6] * 3, 2),
        ([0.9] * 100, 3),
    ],
)
def test_plateau_drops_follow_from_the_validation_errors(errors: list[float], drops: int) -> None:
    assert plateau_drops(errors, PLATEAU) == drops
    rate = lr_at(0, PLATEAU, steps_per_epoch=1, total_steps=100, drops=drops)
    assert rate == pytest.approx(0.01 * 0.1**drops)
    assert plateau_drops(errors, ScheduleConfig(kind="step")) == 0


@given(st.lists(st.floats(0, 1), max_size=60))
def test_plateau_drop_is_never_taken_back(errors: list[float]) -> None:
    counts = [plateau_drops(errors[:n], PLATEAU) for n in range(len(errors) + 1)]
    assert counts == sorted(counts) and all(b - a <= 1 for a, b in itertools.pairwise(counts))


@given(
    kind=st.sampled_from(["step", "plateau", "poly", "cosine", "constant"]),
    warmup=st.floats(0, 3),
    steps_per_epoch=st.integers(1, 50),
    epochs=st.integers(1, 20),
)
def test_learning_rate_is_positive_and_at_most_the_base(
    kind: str, warmup: float, steps_per_epoch: int, epochs: int
) -> None:
    schedule = ScheduleConfig(learning_rate=0.1, kind=kind, warmup_epochs=warmup, milestones=(2.0, 5.0))  # type: ignore[arg-type]
    found = rates(schedule, steps_per_epoch=steps_per_epoch, epochs=epochs)
    assert all(0 < rate <= 0.1 for rate in found)
