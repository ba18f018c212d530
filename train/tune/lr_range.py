"""`alexnet bench lr`: a learning-rate range test of a recipe, and the rate that it recommends."""

from __future__ import annotations

import math

import msgspec

from data_pipeline.common.console import show_progress
from data_pipeline.common.errors import UserError
from train.bench.harness import Report, table_lines
from train.config.schema import RunConfig
from train.health.flat_loss import guess_loss, suggest_changes
from train.optim.schedule import base_lr_for
from train.tune.rate_range import advise_rate, rates_between, read_sweep, why_ended
from train.tune.steps import open_probe

RANGES = {"sgd": (1e-4, 1.0), "lars": (1e-2, 100.0)}
"""First and last rate by optimiser, unless options name them."""
NUM_LINES = 13


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
                    rate = rates[len(losses)]
                    loss = step(rate).loss
                    losses.append(loss if math.isfinite(loss) else None)
                    progress.advance(1, f"seed {seeded.seed}, rate {rate:.2g}, loss {loss:.3f}")
            progress.advance(num_steps - len(losses))
            sweeps.append(read_sweep(seeded.seed, rates[: len(losses)], losses, num_steps, level))
    advice = advise_rate(sweeps, level, suggest_changes(config.model))
    scale = base_lr_for(config.schedule, config.global_batch) / config.schedule.learning_rate
    return {
        "recipe": config.recipe,
        "device": device,
        "global_batch": config.global_batch,
        "guess_loss": level,
        "recipe_rate": base_lr_for(config.schedule, config.global_batch),
        "sweeps": sweeps,
        "learning_rate": advice.rate,
        "setting": f"schedule.learning_rate={advice.rate / scale:.3g}" if advice.rate is not None else None,
        "why": advice.why,
    }


def describe(report: Report) -> list[str]:
    """Return the loss by rate, the end of each sweep, and the advice."""
    sweeps = report["sweeps"]
    longest = max(sweeps, key=lambda sweep: len(sweep.rates)).rates
    last = len(longest) - 1
    rows = [
        [longest[place], "",
         *(f"{s.smoothed[place]:.3f}" if place < len(s.smoothed) else "ended" for s in sweeps)]
        for place in dict.fromkeys(round(n * last / (NUM_LINES - 1)) for n in range(NUM_LINES))
    ]  # fmt: skip
    lines = [
        f"recipe {report['recipe']}, batch {report['global_batch']}, on {report['device']}: training loss as "
        f"the rate grows, {len(sweeps)} sweep(s), running medians",
        *table_lines([("rate", ">10.2g"), ("", "<2"), *((f"seed {s.seed}", ">10") for s in sweeps)], rows),
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
