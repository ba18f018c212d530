"""The soak's plan: a function of its seed, with every kind of fault."""

from __future__ import annotations

import numpy as np

from scripts.soak.plan import (
    KINDS,
    NUM_SAMPLES,
    READ_AHEAD_STEPS,
    STEPS_PER_EPOCH,
    corruptible,
    make_plan,
    next_ranks,
    steps_of,
)


def test_soak_plan_follows_from_its_seed_and_covers_every_kind() -> None:
    plan = make_plan(7, num_faults=10, total_steps=84)
    assert plan == make_plan(7, num_faults=10, total_steps=84) != make_plan(8, num_faults=10, total_steps=84)
    assert {fault.kind for fault in plan[: len(KINDS)]} == set(KINDS)
    steps = [fault.step for fault in plan]
    assert steps == sorted(steps) and steps[0] >= 2 and steps[-1] <= 80


def test_soak_changes_the_number_of_ranks_where_it_can() -> None:
    assert {next_ranks(draw, 2, (1, 2, 3)) for draw in range(4)} == {1, 3}
    assert next_ranks(5, 2, ()) == 2


def test_soak_corrupts_only_images_far_apart_in_epochs() -> None:
    steps = steps_of(3, epochs=6)
    for epoch in range(6):  # each step of an epoch takes its share of all images
        assert np.unique(steps[epoch], return_counts=True)[1].tolist() == [103] * STEPS_PER_EPOCH
    chosen = corruptible(3, epochs=6)
    assert 50 < len(chosen) < NUM_SAMPLES
    assert (np.diff(steps[:, chosen], axis=0) > READ_AHEAD_STEPS).all()
