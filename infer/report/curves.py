"""The section with the curves: loss, accuracy, learning rate and speed by epoch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from infer.report.chart import Line, line_chart
from infer.report.page import BLUE, GREEN, ORANGE, figure, note
from train.runs.folder import MetricsRow

NO_ROWS = "There are no rows of training here: metrics.jsonl is gone, or empty."
MAX_POINTS = 400
"""Most points of a line; of more, neighbours are averaged."""
LOG_BELOW, LOG_SHARE = 1 / 50, 0.25
"""The axis of learning rates is logarithmic if this share of them is below this share of the largest: after
drops by ten, but not for the last steps of a cosine."""


def make_curves(rows: Sequence[MetricsRow]) -> str:
    """Draw what `metrics.jsonl` holds.

    Args:
        rows: in order; none for an export without its run.
    """
    train = [row for row in rows if row.split == "train"]
    val = [row for row in rows if row.split == "val"]
    if not rows:
        return note(NO_ROWS)

    def line(
        name: str, of: Sequence[MetricsRow], field: str, color: str, *, scale: float = 1, dashed: bool = False
    ) -> Line:
        values = scale * np.array([getattr(row, field) for row in of], dtype=np.float64)  # None is NaN
        return Line(name, thinned(epochs_at(of, val)), thinned(values.tolist()), color, dashed)

    rates = [row.lr for row in train or val if row.lr > 0]
    log = sum(rate < LOG_BELOW * max(rates) for rate in rates) > LOG_SHARE * len(rates)
    rated = [row for row in train or val if row.lr > 0 or not log]
    panels = [
        ("Loss", "nats per image", False, [
            line("training", train, "loss", ORANGE, dashed=True),
            line("validation", val, "loss", BLUE),
        ], "Cross-entropy. Training images are augmented and seen under dropout, and smoothed labels count, "
         "so that the two need not meet."),
        ("Accuracy", "% of images", False, [
            line("top-1", val, "top1", BLUE, scale=100),
            line("top-5", val, "top5", GREEN, scale=100),
        ], "Validation images whose class is the most probable one, or among the five most probable."),
        ("Learning rate", "rate", log, [line("rate", rated, "lr", BLUE)],
         f"Of the last step of each row{', on a logarithmic axis' if log else ''}."),
        ("Speed", "images per second", False, [
            line("training", train, "images_per_s", ORANGE, dashed=True),
            line("validation", val, "images_per_s", BLUE),
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
    return f'<p>{num_rows}{means}.</p><div class="charts">{"".join(charts)}</div>'


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


def thinned(values: Sequence[float]) -> list[float]:
    """At most `MAX_POINTS` values: means of equally many neighbours; NaN where one of them is."""
    size = max(1, -(-len(values) // MAX_POINTS))
    return [float(np.mean(values[start : start + size])) for start in range(0, len(values), size)]
