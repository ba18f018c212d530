"""Turns the runs of a study into a table and a picture."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from scripts.study.runs import Run
from scripts.study.studies import Study

LINE_STYLES = ("-", "--", "-.", ":", (0, (1, 3)))


def describe_spread(values: Sequence[float]) -> str:
    """Format fractions as percent: mean and range; a single one by itself, and `-` for none.

    >>> describe_spread([0.99, 0.97, 0.98])
    '98.0% (97.0 to 99.0)'
    >>> describe_spread([0.5])
    '50.0%'
    """
    if not values:
        return "-"
    mean = f"{100 * statistics.mean(values):.1f}%"
    if len(values) == 1:
        return mean
    low, high = (f"{100 * value:.1f}" for value in (min(values), max(values)))
    return f"{mean} ({low} to {high})"


def first_epoch_above(run: Run, top1: float) -> int | None:
    """The first epoch with at least this held-out top-1; None where there is none."""
    return next((epoch.epoch for epoch in run.epochs if epoch.top1 >= top1), None)


def make_table(study: Study, runs: Sequence[Run]) -> str:
    """Format the runs by setting as Markdown: means and ranges over the seeds."""
    header = ["question", "setting", "seeds", "top-1 after the last epoch", "top-5", "best top-1"]
    header += [f"first epoch above {study.mark:.0%}", "minutes a run", "ended early"]
    rows = []
    for question, group in study.questions.items():
        for name, setting in group.items():
            mine = sorted((run for run in runs if run.setting == setting), key=lambda run: run.seed)
            whole = [run for run in mine if not run.ended]
            ended = [str(run.epochs[-1].epoch) for run in mine if run.ended]
            row = [question, name, ", ".join(str(run.seed) for run in mine)]
            row.append(describe_spread([run.epochs[-1].top1 for run in whole]))
            row.append(describe_spread([run.epochs[-1].top5 for run in whole]))
            row.append(describe_spread([max(epoch.top1 for epoch in run.epochs) for run in whole]))
            row.append(", ".join(str(first_epoch_above(run, study.mark) or "never") for run in mine))
            row.append(f"{statistics.mean(run.seconds for run in mine) / 60:.1f}" if mine else "-")
            row.append(f"{len(ended)} of {len(mine)}, flat, in epoch {', '.join(ended)}" if ended else "none")
            rows.append(row)
    seconds = sum(run.seconds for run in runs)
    most = max((len(run.epochs) for run in runs), default=0)
    end = f"{len(runs)} runs of {most} epochs at most, {seconds / 60:.0f} minutes together."
    lines = [f"| {' | '.join(row)} |" for row in (header, *rows)]
    return "\n".join([lines[0], "|---" * len(header) + "|", *lines[1:], "", end]) + "\n"


def draw(study: Study, runs: Sequence[Run], path: Path) -> None:
    """Draw a panel for each question: the held-out top-1 by epoch, mean and range over the seeds."""
    from train.tune.plots import COLORS, GREY, draw_panels

    last = max(2, *(len(run.epochs) for run in runs))
    with draw_panels(path, len(study.questions)) as panels:
        for panel, (question, group) in zip(panels, study.questions.items(), strict=True):
            for (name, setting), color, style in zip(
                group.items(), (*COLORS, GREY), LINE_STYLES, strict=False
            ):
                mine = [run for run in runs if run.setting == setting]
                # A run that ended early is drawn as far as it went, and so the mean is over fewer seeds.
                epochs = range(1, max((len(run.epochs) for run in mine), default=0) + 1)
                by_epoch = [[100 * r.epochs[e - 1].top1 for r in mine if len(r.epochs) >= e] for e in epochs]
                means, lows, highs = ([f(v) for v in by_epoch] for f in (statistics.mean, min, max))
                flat = sum(bool(run.ended) for run in mine)
                label = name + (f" ({flat} of {len(mine)} ended: flat)" if flat else "")
                panel.plot(epochs, means, linestyle=style, color=color, label=label)
                panel.fill_between(epochs, lows, highs, color=color, alpha=0.15, lw=0)
            panel.set(xlabel="epoch", ylim=(0, None), xlim=(1, last), title=question)
            panel.legend(loc="best", fontsize=8)
        highest = max(panel.get_ylim()[1] for panel in panels)
        for panel in panels:
            panel.set_ylim(0, highest)  # panels are compared, too
        panels[0].set_ylabel(study.axis)
