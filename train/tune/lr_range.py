"""`alexnet bench lr`: a learning-rate range test of a recipe, and the rate that it recommends.

The rate grows from step to step, and the loss shows how far it may.
Source: Smith 2017, "Cyclical Learning Rates for Training Neural Networks", section 3.3.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Literal

import msgspec

from data_pipeline.common.console import show_progress
from data_pipeline.common.errors import UserError
from train.bench.harness import Report, table_lines
from train.config.schema import RunConfig
from train.health.flat_loss import BELOW, guess_loss, suggest_changes
from train.optim.schedule import base_lr_for
from train.tune.steps import open_probe

RANGES = {"sgd": (1e-4, 1.0), "lars": (1e-2, 100.0)}
"""First and last rate by optimiser, unless options name them."""
NUM_LINES = 13
BLOWN = 4.0
"""A sweep ends at a loss of more than so many times the first one and that of guessing."""
MAX_SKIPPED = 5
"""A sweep ends after so many steps in a row without a finite gradient; float16 skips some at the start."""
SMOOTHED_SHARE = 0.1
"""Share of the steps over which the loss is smoothed, by its median, which single batches do not move."""
MARGIN = 2.0
"""The recommended rate is the largest one that still works, divided by this.

Source: Bengio 2012, "Practical recommendations for gradient-based training of deep architectures", section
3.1.1: the best rate is usually within a factor of 2 of the largest that does not make the loss diverge."""


class Sweep(msgspec.Struct, frozen=True, kw_only=True):
    """One pass over the range, from fresh weights.

    Attributes:
        seed: of weights, order and masks.
        rates: one a step, ascending.
        losses: of each step's batch, before the step; None for a step that was skipped.
        smoothed: running median of the losses.
        ended: why it ended before the highest rate; None if it did not.
        best_rate: where the smoothed loss is lowest; None if it never was below that of guessing.
        largest_rate: the last one above it before the smoothed loss is nearer to guessing than to the lowest.
        edge: the end of the range that one of them is at, so that rates beyond it may be better.
    """

    seed: int
    rates: list[float]
    losses: list[float | None]
    smoothed: list[float]
    ended: str | None
    best_rate: float | None
    largest_rate: float | None
    edge: Literal["low", "high"] | None


def bench_rates(
    config: RunConfig, *, low: float | None, high: float | None, num_steps: int, num_sweeps: int
) -> Report:
    """Train from fresh weights while the rate grows from step to step, once for each seed.

    Args:
        config: the run's; its schedule and its number of epochs play no part.
        low, high: the first rate and the last; None for the optimiser's of `RANGES`.
        num_steps: of each sweep.
        num_sweeps: how many, with the seeds from `config.seed` on.
    Returns:
        `guess_loss`, the loss of guessing; `recipe_rate`, the recipe's own rate after its warm-up;
        `learning_rate`, the recommended one, None where none follows; `setting`, the `--set` that gives it,
        undoing the recipe's own scaling with the batch. The rates are for `global_batch`.
    Raises:
        UserError: an empty range, or from the parts, as in a run.
    """
    default_low, default_high = RANGES[config.optimizer.name]
    low, high = low or default_low, high or default_high
    if low >= high:
        raise UserError(f"the first rate (--from) must be below the last (--to), not {low:g} and {high:g}")
    rates, sweeps, level, device = rates_between(low, high, num_steps), [], 0.0, ""
    with show_progress("learning rates", num_sweeps * num_steps) as progress:
        for number in range(num_sweeps):
            seeded = msgspec.structs.replace(config, seed=config.seed + number)
            losses: list[float | None] = []
            with open_probe(seeded) as (run, step):
                level = guess_loss(config, run.train_set)
                device = run.parts.world.device_name
                while len(losses) < num_steps and why_ended(losses, level) is None:
                    tried = rates[len(losses)]
                    loss = step(tried).loss
                    losses.append(loss if math.isfinite(loss) else None)
                    progress.advance(1, f"seed {seeded.seed}, rate {tried:.2g}, loss {loss:.3f}")
            progress.advance(num_steps - len(losses))
            sweeps.append(read_sweep(seeded.seed, rates[: len(losses)], losses, num_steps, level))
    rate, why = advise_rate(sweeps, level, suggest_changes(config.model))
    recipe_rate = base_lr_for(config.schedule, config.global_batch)
    scale = recipe_rate / config.schedule.learning_rate
    return {
        "recipe": config.recipe,
        "device": device,
        "global_batch": config.global_batch,
        "guess_loss": level,
        "recipe_rate": recipe_rate,
        "sweeps": sweeps,
        "learning_rate": rate,
        "setting": f"schedule.learning_rate={rate / scale:.3g}" if rate is not None else None,
        "why": why,
    }


def rates_between(low: float, high: float, num_steps: int) -> list[float]:
    """Return rates from `low` to `high`, each the same multiple of the one before.

    >>> [round(rate, 6) for rate in rates_between(0.001, 1.0, 4)]
    [0.001, 0.01, 0.1, 1.0]
    """
    return [low * (high / low) ** (number / (num_steps - 1)) for number in range(num_steps)]


def why_ended(losses: Sequence[float | None], level: float) -> str | None:
    """Return the reason to end a sweep after these steps; None to continue it.

    Args:
        losses: one a step so far; None for a step that was skipped.
        level: the loss of guessing.

    >>> why_ended([2.0, 3.0, None], 2.3), why_ended([2.0, 9.5], 2.3)
    (None, 'the loss was 9.5')
    """
    if len(losses) >= MAX_SKIPPED and all(loss is None for loss in losses[-MAX_SKIPPED:]):
        return f"{MAX_SKIPPED} steps in a row had no finite gradient"
    first = next((loss for loss in losses if loss is not None), level)
    if losses and losses[-1] is not None and losses[-1] > BLOWN * max(first, level):
        return f"the loss was {losses[-1]:.3g}"
    return None


def smooth(losses: Sequence[float | None], width: int) -> list[float]:
    """Return the running median over `width` steps, fewer at both ends; a step without a loss counts as inf.

    >>> smooth([3.0, 2.0, 9.0, 1.0, None], 3)
    [2.5, 3.0, 2.0, 9.0, inf]
    """
    filled = [float("inf") if loss is None else loss for loss in losses]
    half = width // 2
    return [statistics.median(filled[max(0, n - half) : n + half + 1]) for n in range(len(filled))]


def read_sweep(
    seed: int, rates: Sequence[float], losses: Sequence[float | None], num_steps: int, level: float
) -> Sweep:
    """Evaluate the steps of one sweep.

    Args:
        rates, losses: of the steps that were made, at least one.
        num_steps: of a whole sweep.
        level: the loss of guessing.
    """
    width = max(3, round(SMOOTHED_SHARE * num_steps) | 1)
    smoothed = smooth(losses, width)
    best = min(range(len(smoothed)), key=smoothed.__getitem__)
    learned, ended = smoothed[best] < BELOW * level, why_ended(losses, level)
    limit = (smoothed[best] + level) / 2
    largest = best
    while largest + 1 < len(smoothed) and smoothed[largest + 1] < limit:
        largest += 1
    edge: Literal["low", "high"] | None = None
    if learned and best <= width // 2:
        edge = "low"
    elif learned and ended is None and largest + width // 2 >= len(smoothed) - 1:
        edge = "high"
    return Sweep(
        seed=seed,
        rates=list(rates),
        losses=list(losses),
        smoothed=smoothed,
        ended=ended,
        best_rate=rates[best] if learned else None,
        largest_rate=rates[largest] if learned else None,
        edge=edge,
    )


def advise_rate(sweeps: Sequence[Sweep], level: float, changes: Sequence[str]) -> tuple[float | None, str]:
    """Recommend a rate, None where the sweeps give none, with the reason, a sentence.

    Args:
        level: the loss of guessing.
        changes: what else may make a network learn that only guesses.
    """
    rates = [sweep.largest_rate for sweep in sweeps if sweep.largest_rate is not None]
    flat = len(sweeps) - len(rates)
    lowest, highest = min(sweep.rates[0] for sweep in sweeps), max(sweep.rates[-1] for sweep in sweeps)
    if not rates:
        tries = ["more --steps", f"a lower --from than {lowest:.3g}", *changes]
        why = f"no rate brought the loss below {level:.4g}, which is what guessing costs: try "
        return None, why + ", or ".join(tries)
    edges = {sweep.edge for sweep in sweeps}
    if "high" in edges:
        return None, f"the loss was still low at the last rate, {highest:.3g}: try a higher --to"
    if "low" in edges:
        return None, f"the loss rose from {lowest:.3g} on: try a lower --from"
    largest = statistics.median(rates)
    over = f" (the median; {min(rates):.2g} to {max(rates):.2g} over {len(rates)} seeds)" if rates[1:] else ""
    why = (
        f"the loss stayed low up to a rate of {largest:.2g}{over}; the best rate is usually about half of "
        "the largest that works (Bengio 2012)"
    )
    if flat:
        why += f". {flat} of {len(sweeps)} sweeps never left the loss of guessing, {level:.4g}: so may a run"
    return float(f"{largest / MARGIN:.2g}"), why


def describe(report: Report) -> list[str]:
    """Return the loss by rate, the end of each sweep, and the advice."""
    sweeps = report["sweeps"]
    longest = max(sweeps, key=lambda sweep: len(sweep.rates)).rates
    last = len(longest) - 1
    rows = []
    for place in dict.fromkeys(round(n * last / (NUM_LINES - 1)) for n in range(NUM_LINES)):
        row: dict[str, float | str] = {"rate": float(f"{longest[place]:.2g}")}
        for s in sweeps:
            row[f"seed {s.seed}"] = f"{s.smoothed[place]:.3f}" if place < len(s.smoothed) else "ended"
        rows.append(row)
    lines = [
        f"recipe {report['recipe']}, batch {report['global_batch']}, on {report['device']}: training loss as "
        f"the rate grows, {len(sweeps)} sweep(s), running medians",
        *table_lines(rows),
    ]
    for sweep in sweeps:
        if sweep.ended is not None:
            lines.append(f"seed {sweep.seed} ended at a rate of {sweep.rates[-1]:.2g}: {sweep.ended}")
    best = ", ".join("none" if s.best_rate is None else f"{s.best_rate:.2g}" for s in sweeps)
    lines.append(f"the loss was lowest at {best}")
    guess, recipe_rate, rate = report["guess_loss"], report["recipe_rate"], report["learning_rate"]
    lines.append(f"guessing costs {guess:.3f}; the recipe's rate is {recipe_rate:.3g}")
    if rate is None:
        return [*lines, f"no rate to recommend: {report['why']}"]
    return [*lines, f"recommended rate {rate:g} (--set {report['setting']}): {report['why']}"]
