"""`alexnet bench lr`: a learning-rate range test of a recipe, and the rate that it recommends."""

from __future__ import annotations

import math
import statistics
from pathlib import Path

import msgspec

from data_pipeline.common.console import show_progress
from data_pipeline.common.errors import UserError
from train.config.schema import RunConfig
from train.health.flat_loss import flat_level, suggest_changes
from train.optim.schedule import base_lr_for
from train.tune.plots import COLORS, GREY, draw_panels, mark_line
from train.tune.rate_range import Sweep, advise_rate, rates_between, read_sweep, why_ended
from train.tune.steps import open_probe

RANGES = {"sgd": (1e-4, 1.0), "lars": (1e-2, 100.0)}
"""Where an optimiser's rates lie, if nothing else is asked for."""
NUM_LINES = 13
"""Of the table."""


class RateReport(msgspec.Struct, frozen=True, kw_only=True):
    """What `bench_rates` measured.

    Args:
        recipe: whose network, data, batch, optimiser and precision these are.
        device: what computed.
        global_batch: samples of a step; the rates are for it.
        guess_loss: the loss of guessing, ln(classes) where all are as frequent.
        recipe_rate: the recipe's own rate after its warm-up, for this batch.
        sweeps: one for each seed.
        learning_rate: the recommended rate after the warm-up, for this batch; None where none follows.
        setting: `--set` that gives it, undoing the recipe's own scaling with the batch.
        why: in a sentence.
    """

    recipe: str
    device: str
    global_batch: int
    guess_loss: float
    recipe_rate: float
    sweeps: list[Sweep]
    learning_rate: float | None
    setting: str | None
    why: str


def bench_rates(
    config: RunConfig,
    *,
    low: float | None = None,
    high: float | None = None,
    num_steps: int = 100,
    num_sweeps: int = 3,
) -> RateReport:
    """Train from fresh weights while the rate grows from step to step, once for each seed.

    Args:
        config: the run's; its schedule and its number of epochs play no part.
        low: the first rate; None for the optimiser's of `RANGES`.
        high: the last.
        num_steps: of each sweep.
        num_sweeps: how many, with the seeds from `config.seed` on.
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
            with open_probe(seeded) as probe:
                train_set = probe.run_state.train_set
                level = flat_level(train_set.labels, len(train_set.classes), config.label_smoothing)
                device = probe.run_state.parts.world.device_name
                while len(losses) < num_steps and why_ended(losses, level) is None:
                    rate = rates[len(losses)]
                    loss = probe.step(rate).loss
                    losses.append(loss if math.isfinite(loss) else None)
                    progress.advance(1, f"seed {seeded.seed}, rate {rate:.2g}, loss {loss:.3f}")
            progress.advance(num_steps - len(losses))
            sweeps.append(read_sweep(seeded.seed, rates[: len(losses)], losses, num_steps, level))
    advice = advise_rate(sweeps, level, suggest_changes(config.model))
    scale = base_lr_for(config.schedule, config.global_batch) / config.schedule.learning_rate
    return RateReport(
        recipe=config.recipe,
        device=device,
        global_batch=config.global_batch,
        guess_loss=level,
        recipe_rate=base_lr_for(config.schedule, config.global_batch),
        sweeps=sweeps,
        learning_rate=advice.rate,
        setting=f"schedule.learning_rate={advice.rate / scale:.3g}" if advice.rate is not None else None,
        why=advice.why,
    )


def describe(report: RateReport) -> str:
    """The report for a person: the loss by rate, and the advice."""
    lines = [
        f"recipe {report.recipe}, batch {report.global_batch}, on {report.device}: training loss as the rate "
        f"grows, {len(report.sweeps)} sweep(s), running medians",
        f"{'rate':>10}  " + "".join(f"{f'seed {sweep.seed}':>10}" for sweep in report.sweeps),
    ]
    longest = max(report.sweeps, key=lambda sweep: len(sweep.rates))
    last = len(longest.rates) - 1
    for place in dict.fromkeys(round(n * last / (NUM_LINES - 1)) for n in range(NUM_LINES)):
        cells = (
            f"{sweep.smoothed[place]:10.3f}" if place < len(sweep.smoothed) else f"{'ended':>10}"
            for sweep in report.sweeps
        )  # fmt: skip
        lines.append(f"{longest.rates[place]:10.2g}  " + "".join(cells))
    for sweep in report.sweeps:
        if sweep.ended is not None:
            lines.append(f"seed {sweep.seed} ended at a rate of {sweep.rates[-1]:.2g}: {sweep.ended}")
    best = ", ".join("none" if s.best_rate is None else f"{s.best_rate:.2g}" for s in report.sweeps)
    lines.append(f"the loss was lowest at {best}")
    lines.append(f"guessing costs {report.guess_loss:.3f}; the recipe's rate is {report.recipe_rate:.3g}")
    if report.learning_rate is None:
        lines.append(f"no rate to recommend: {report.why}")
    else:
        lines.append(f"recommended rate {report.learning_rate:g} (--set {report.setting}): {report.why}")
    return "\n".join(lines)


def draw(report: RateReport, path: Path) -> None:
    """The loss by rate: a dot for each step, a line for each sweep's running median."""
    with draw_panels(path, 1, width=1.45) as (panel,):
        for number, sweep in enumerate(report.sweeps):
            color = COLORS[number % len(COLORS)]
            dots = [float("nan") if loss is None else loss for loss in sweep.losses]
            panel.plot(sweep.rates, dots, ".", color=color, markersize=2.5, alpha=0.5)
            panel.plot(sweep.rates, sweep.smoothed, color=color, label=f"seed {sweep.seed}, running median")
        mark_line(panel, report.recipe_rate, f"the recipe's, {report.recipe_rate:.3g}", GREY, dashed=True)
        if report.learning_rate is not None:
            mark_line(panel, report.learning_rate, f"recommended, {report.learning_rate:g}", "black")
        panel.axhline(report.guess_loss, color=GREY, linewidth=1, linestyle=":", label="guessing")
        starts = statistics.median(sweep.smoothed[0] for sweep in report.sweeps)
        panel.set(
            xscale="log", xlabel="learning rate", ylabel="training loss",
            ylim=(0, 1.25 * max(starts, report.guess_loss)),
            title=f"{report.recipe}, batch {report.global_batch}",
        )  # fmt: skip
        panel.legend(loc="lower left", fontsize=7.5)
