"""Exact counts of hits and losses, and of each pair of classes in any shares."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipeline.datasets.dataset import Dataset
from train.distributed.world import open_world
from train.health.metrics import AccuracyMeter, ClassMeter

CPU = torch.device("cpu")
NAMES = tuple("abcdefgh")


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


@pytest.mark.parametrize("num_shares", [1, 2, 3])
def test_counts_do_not_depend_on_how_the_split_is_shared(num_shares: int) -> None:
    torch.manual_seed(0)
    logits_NC, labels_N = torch.randn(60, 8), torch.randint(0, 8, (60,))
    valid_N, ranked_NK = torch.rand(60) > 0.1, logits_NC.topk(5).indices
    meter = ClassMeter(CPU, 8)
    for part in torch.arange(60).tensor_split(num_shares):
        for start in range(0, len(part), 7):
            batch = part[start : start + 7]
            meter.add(logits_NC[batch], ranked_NK[batch], labels_N[batch], valid_N[batch], batch)
    split = Dataset(Path(), "val", [f"{index}.jpg" for index in range(60)], labels_N.numpy(), NAMES)
    with open_world("cpu") as world:
        counts, report = meter.reduce(world, split)
    expected = np.zeros((8, 8), dtype=np.int64)
    found_N = logits_NC.argmax(dim=1)
    for truth, found in zip(labels_N[valid_N].tolist(), found_N[valid_N].tolist(), strict=True):
        expected[truth, found] += 1
    assert counts.confusion.tolist() == expected.tolist()
    top5 = (ranked_NK == labels_N[:, None]).any(dim=1) & valid_N
    assert counts.top5.tolist() == torch.bincount(labels_N[top5], minlength=8).tolist()
    sure_N = logits_NC.softmax(dim=1).amax(dim=1)
    wrong = [i for i in range(60) if valid_N[i] and found_N[i] != labels_N[i]]
    surest = sorted(wrong, key=lambda i: (-round(float(sure_N[i]), 4), i))[:20]
    assert [mistake.path for mistake in report.mistakes] == [f"val/{i}.jpg" for i in surest]
    first = report.mistakes[0]
    assert (first.truth, first.predicted) == (NAMES[labels_N[surest[0]]], NAMES[found_N[surest[0]]])
    assert first.probability == round(float(sure_N[surest[0]]), 4)
