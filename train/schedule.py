"""The learning rate as a pure function of the optimiser step."""

from __future__ import annotations

import math

from train.config import ScheduleConfig

WARMUP_START = 0.01
"""Where the linear warm-up begins, as a fraction of the base rate."""


def lr_at(step: int, schedule: ScheduleConfig, *, steps_per_epoch: int, total_steps: int) -> float:
    """Learning rate for one optimiser step.

    Args:
        step: optimiser steps finished so far, 0-based.
        schedule: base rate, warm-up and decay, in epochs.
        steps_per_epoch: optimiser steps in one pass over the data, at least 1.
        total_steps: optimiser steps of the whole run.
    Returns:
        The rate to use for the next step, above 0 (`cosine` reaches 0 only after the last one).
    Source: Goyal et al. 2017, section 2.2 (warm-up); Krizhevsky et al. 2012, section 5 (decay by 10);
        Loshchilov & Hutter 2017 (cosine).

    >>> schedule = ScheduleConfig(learning_rate=0.1, kind="step", milestones=(2.0,), factor=0.5)
    >>> [lr_at(s, schedule, steps_per_epoch=10, total_steps=30) for s in (0, 19, 20)]
    [0.1, 0.1, 0.05]
    """
    base = schedule.learning_rate
    warmup_steps = schedule.warmup_epochs * steps_per_epoch
    if step < warmup_steps:
        return base * (WARMUP_START + (1 - WARMUP_START) * step / warmup_steps)
    if schedule.kind == "cosine":
        decay_steps = max(total_steps - warmup_steps, 1)
        return base * 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / decay_steps))
    if schedule.kind == "step":
        passed = sum(step >= milestone * steps_per_epoch for milestone in schedule.milestones)
        return base * schedule.factor**passed
    return base
