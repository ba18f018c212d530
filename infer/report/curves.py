"""The section with the curves: loss, accuracy, learning rate and speed by epoch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from infer.report.chart import Line, line_chart
from infer.report.page import BLUE, GREEN, ORANGE, Section, figure, note
from train.runs.folder import MetricsRow

MAX_POINTS = 400
"""Most points of a line; of more, neighbours are averaged."""
LOG_BELOW, LOG_SHARE = 1 / 50, 0.25
"""The axis of learning rates is logarithmic if this share of them is below this share of the largest: after
drops by ten, but not for the last steps of a cosine."""


def make_curves(rows: Sequence[MetricsRow]) -> Section:
    """Draw what `metrics.jsonl` holds.

    Args:
        rows: in order; none for an export without its run.
    """
    key, title = "curves", "Curves"
    train = [row for row in rows if row.split == "train"]
    val = [row for row in rows if row.split == "val"]
    if not rows:
        return Section(
            key, title, note("There are no rows of training here: metrics.jsonl is gone, or empty.")
        )

    def line(
        name: str,
        of: Sequence[MetricsRow],
        value: Callable[[MetricsRow], float | None],
        color: str,
        dashed: bool = False,
    ) -> Line:
        found = [value(row) for row in of]
        xs, ys = thinned(epochs_at(of, val), [math.nan if y is None else y for y in found])
        return Line(name, xs, ys, color, dashed)

    rates = [row.lr for row in train or val if row.lr > 0]
    log = sum(rate < LOG_BELOW * max(rates) for rate in rates) > LOG_SHARE * len(rates)
    rated = [row for row in train or val if row.lr > 0 or not log]
    panels = [
        ("Loss", "nats per image", False, [
            line("training", train, lambda row: row.loss, ORANGE, True),
            line("validation", val, lambda row: row.loss, BLUE),
        ], "Cross-entropy. Training images are augmented and seen under dropout, and smoothed labels count, "
         "so that the two need not meet."),
        ("Accuracy", "% of images", False, [
            line("top-1", val, lambda row: _points(row.top1), BLUE),
            line("top-5", val, lambda row: _points(row.top5), GREEN),
        ], "Validation images whose class is the most probable one, or among the five most probable."),
        ("Learning rate", "rate", log, [line("rate", rated, lambda row: row.lr, BLUE)],
         f"Of the last step of each row{', on a logarithmic axis' if log else ''}."),
        ("Speed", "images per second", False, [
            line("training", train, lambda row: row.images_per_s, ORANGE, True),
            line("validation", val, lambda row: row.images_per_s, BLUE),
        ], "Over all ranks, with decoding."),
    ]  # fmt: skip
    x_label = "epoch" if val else "optimiser step"
    charts = []
    for name, unit, is_log, lines, caption in panels:
        known = [one for one in lines if any(map(math.isfinite, one.ys))]
        if known:
            drawn = line_chart(name, known, x_label=x_label, y_label=unit, log=is_log)
            charts.append(figure(drawn, caption))
        else:
            charts.append(note(f"{name}: no row has a value."))
    num_rows = f"{len(train)} rows of training and {len(val)} of validation"
    averaged = max(len(train), len(val)) > MAX_POINTS
    means = f"; lines of more than {MAX_POINTS} points show the means of neighbours" if averaged else ""
    return Section(key, title, f'<p>{num_rows}{means}.</p><div class="charts">{"".join(charts)}</div>')


def _points(share: float | None) -> float | None:
    return None if share is None else 100 * share


def epochs_at(rows: Sequence[MetricsRow], val: Sequence[MetricsRow]) -> list[float]:
    """The place of each row in epochs, by the steps at which the epochs ended; in steps where none has."""
    steps = np.array([row.step for row in rows], dtype=np.float64)
    if not val:
        return [float(step) for step in steps]
    ends = {row.step: row.epoch for row in val}
    known_steps, known_epochs = [0.0, *ends.keys()], [0.0, *ends.values()]
    places = np.interp(steps, known_steps, known_epochs)
    # Behind the last validation an epoch is as long as those before.
    per_epoch = known_steps[-1] / known_epochs[-1] if known_epochs[-1] else 1.0
    behind = steps > known_steps[-1]
    places[behind] = known_epochs[-1] + (steps[behind] - known_steps[-1]) / per_epoch
    return [float(place) for place in places]


def thinned(xs: Sequence[float], ys: Sequence[float]) -> tuple[list[float], list[float]]:
    """At most `MAX_POINTS` points: means of equally many neighbours; NaN where one of them is."""
    size = -(-len(xs) // MAX_POINTS)
    if size <= 1:
        return list(xs), list(ys)
    starts = range(0, len(xs), size)
    return (
        [float(np.mean(xs[start : start + size])) for start in starts],
        [float(np.mean(ys[start : start + size])) for start in starts],
    )
