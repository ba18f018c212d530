"""The curves: rows in epochs, and many rows as few points."""

from __future__ import annotations

import math

import msgspec

from infer.report.curves import MAX_POINTS, epochs_at, make_curves, thinned
from train.runs.folder import MetricsRow

ROW = MetricsRow(
    split="train", epoch=1, step=0, samples=1, failed=0, loss=1.0, top1=0.5, top5=1.0, lr=0.1,
    images_per_s=10.0, time=0.0,
)  # fmt: skip


def rows(split: str, steps: list[int], epochs: list[int]) -> list[MetricsRow]:
    pairs = zip(steps, epochs, strict=True)
    return [msgspec.structs.replace(ROW, split=split, step=step, epoch=epoch) for step, epoch in pairs]


def test_steps_become_epochs_also_when_the_batch_changes() -> None:
    val = rows("val", [100, 150], [1, 2])  # twice the batch in the second epoch
    train = rows("train", [50, 100, 125, 150, 225], [1, 1, 2, 2, 3])
    assert epochs_at(train, val) == [0.5, 1.0, 1.5, 2.0, 3.0]
    assert epochs_at(train, []) == [50, 100, 125, 150, 225]


def test_many_points_become_means_of_neighbours() -> None:
    xs = [float(x) for x in range(3 * MAX_POINTS)]
    ys = [1.0, 2.0, 6.0] * MAX_POINTS
    ys[4] = math.nan
    few_xs, few_ys = thinned(xs), thinned(ys)
    assert len(few_xs) == len(few_ys) == MAX_POINTS and few_xs[:2] == [1.0, 4.0]
    assert few_ys[0] == 3.0 and math.isnan(few_ys[1]) and few_ys[2] == 3.0
    assert thinned(xs[:5]) == xs[:5]


def test_rates_far_apart_have_a_log_axis() -> None:
    val, train = rows("val", [10], [1]), rows("train", [5, 10], [1, 1])
    near = [msgspec.structs.replace(row, lr=lr) for row, lr in zip(train, (0.1, 0.01), strict=True)]
    far = [*near, msgspec.structs.replace(near[0], step=12, lr=0.001)]
    assert "logarithmic" not in make_curves([*near, *val])
    assert "logarithmic" in make_curves([*far, *val])
    last_of_a_cosine = [*near, *near, *far]
    assert "logarithmic" not in make_curves([*last_of_a_cosine, *val])


def test_a_chart_without_values_says_so() -> None:
    every = [*rows("train", [5], [1]), *rows("val", [10], [1])]
    body = make_curves([msgspec.structs.replace(row, loss=None) for row in every])
    assert "Loss: no row has a value" in body and body.count("<svg") == 3
