"""Exact counts of hits and losses."""

from __future__ import annotations

import torch

from train.distributed.world import open_world
from train.health.metrics import AccuracyMeter

CPU = torch.device("cpu")


def test_counts_are_integers_without_unreadable_samples() -> None:
    logits_NC = torch.eye(8)[torch.tensor([0, 1, 2, 3])] * 9 + torch.arange(8) * 0.1
    labels_N = torch.tensor([0, 7, 0, 3])  # right; second; not among five; right, but unreadable
    valid_N = torch.tensor([True, True, True, False])
    counts = AccuracyMeter(CPU)
    counts.add(logits_NC, torch.tensor([1.0, 2.0, 3.0, 100.0]), labels_N, valid_N)
    other = AccuracyMeter(CPU)
    other.merge(counts)
    with open_world("cpu") as world:
        metrics = other.reduce(world)
        empty = AccuracyMeter(CPU).reduce(world)
    assert (metrics.num_samples, metrics.num_failed) == (3, 1)
    assert (metrics.top1, metrics.top5, metrics.loss) == (1 / 3, 2 / 3, 2.0)
    assert empty.num_samples == 0
    assert empty.top1 != empty.top1  # NaN, not 0
