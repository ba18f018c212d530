"""The learning rate as a pure function of the optimiser step, and of the validation errors so far."""

from __future__ import annotations

import math
from collections.abc import Sequence

from train.config.schedule import ScheduleConfig


def lr_at(
    step: int, schedule: ScheduleConfig, *, steps_per_epoch: int, total_steps: int, drops: int = 0
) -> float:
    """Learning rate for one optimiser step.

    Args:
        step: optimiser steps finished so far, 0-based.
        schedule: rate after the warm-up, already scaled to the batch (`base_lr_for`), warm-up and decay.
        steps_per_epoch: optimiser steps in one pass over the data, at least 1.
        total_steps: optimiser steps of the whole run.
        drops: how often `plateau` has lowered the rate, from `plateau_drops`.
    Returns:
        The rate to use for the next step, above 0 (`cosine` and `poly` reach 0 only after the last one).
    Source: Goyal et al. 2017, section 2.2 (warm-up); Krizhevsky et al. 2012, section 5 (decay by 10);
        Loshchilov & Hutter 2017 (cosine); You et al. 2017, section 5 (poly).

    >>> schedule = ScheduleConfig(learning_rate=0.1, kind="step", milestones=(2.0,), factor=0.5)
    >>> [lr_at(s, schedule, steps_per_epoch=10, total_steps=30) for s in (0, 19, 20)]
    [0.1, 0.1, 0.05]
    """
    base, warmup_steps = schedule.learning_rate, schedule.warmup_epochs * steps_per_epoch
    if step < warmup_steps:
        start = schedule.warmup_start
        return base * (start + (1 - start) * step / warmup_steps)
    decay_steps = max(total_steps - warmup_steps, 1)
    if schedule.kind == "cosine":
        return base * 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / decay_steps))
    if schedule.kind == "poly":
        return float(base * (1 - (step - warmup_steps) / decay_steps) ** schedule.power)
    if schedule.kind == "step":
        passed = sum(step >= milestone * steps_per_epoch for milestone in schedule.milestones)
        return base * schedule.factor**passed
    if schedule.kind == "plateau":
        return base * schedule.factor**drops
    return base


def base_lr_for(schedule: ScheduleConfig, global_batch: int) -> float:
    """Scale the learning rate after the warm-up to the batch.

    Source: Goyal et al. 2017, section 2.1 (linear); Krizhevsky 2014, section 5 (square root).

    >>> schedule = ScheduleConfig(learning_rate=0.1, scaling="sqrt", reference_batch=256)
    >>> base_lr_for(schedule, 1024)
    0.2
    """
    if schedule.reference_batch is None or schedule.scaling == "none":
        return schedule.learning_rate
    times = global_batch / schedule.reference_batch
    return schedule.learning_rate * (math.sqrt(times) if schedule.scaling == "sqrt" else times)


def plateau_drops(errors: Sequence[float], schedule: ScheduleConfig) -> int:
    """Count how often `plateau` has lowered the rate after some epochs; 0 for the other kinds.

    Args:
        errors: validation error (1 - top-1) of each epoch so far, in order.
        schedule: patience, smallest improvement, and the limit of drops.
    Source: Krizhevsky et al. 2012, section 5: by hand, when the validation error stopped improving.

    >>> schedule = ScheduleConfig(kind="plateau", patience=2, min_improvement=0.01)
    >>> plateau_drops([0.9, 0.8, 0.795, 0.8, 0.5], schedule)
    1
    """
    if schedule.kind != "plateau":
        return 0
    drops, waited, best = 0, 0, math.inf
    for error in errors:
        if error <= best - schedule.min_improvement and error < best:
            best, waited = error, 0
            continue
        waited += 1
        if waited == schedule.patience:
            drops, waited = drops + 1, 0
    return min(drops, schedule.max_drops)


def describe_lr(schedule: ScheduleConfig, global_batch: int) -> str:
    """Describe the scaled learning rate and its course for the log; the configuration shows neither."""
    base = base_lr_for(schedule, global_batch)
    text = f"learning rate {base:g}"
    if schedule.scaling != "none":
        text += (
            f" ({schedule.learning_rate:g} for a batch of {schedule.reference_batch}, scaled "
            f"{'by the square root of the batch' if schedule.scaling == 'sqrt' else 'with the batch'})"
        )
    if schedule.warmup_epochs:
        text += f", reached from {base * schedule.warmup_start:g} in {schedule.warmup_epochs:g} epoch(s)"
    after = {
        "step": f"times {schedule.factor:g} at epochs {', '.join(f'{m:g}' for m in schedule.milestones)}",
        "plateau": (
            f"times {schedule.factor:g} after {schedule.patience} epoch(s) without a better validation "
            f"top-1, {schedule.max_drops} times at most"
        ),
        "poly": f"falling to 0 with the power {schedule.power:g}",
        "cosine": "falling to 0 as a cosine",
        "constant": "constant",
    }
    constant = schedule.kind == "step" and not schedule.milestones
    return f"{text}, {after['constant' if constant else schedule.kind]}"
