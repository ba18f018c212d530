"""Exact accuracy: integers counted on the device, summed over the ranks, and divided once.

For a whole split and, in the last evaluation of a run, for each pair of classes.
"""

from __future__ import annotations

import math
from copy import copy
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from data_pipeline.common.text import printable
from data_pipeline.datasets.dataset import Dataset
from data_pipeline.results.class_report import (
    NUM_MISTAKES,
    ClassCounts,
    ClassReport,
    make_class_report,
    name_mistakes,
)
from train.distributed.world import World

# Shapes: N samples of one batch, C classes, K of them, M mistakes.

TOP_K = 5


@dataclass(frozen=True)
class Metrics:
    """Loss and accuracy of a set of samples. `top1` and `top5` are fractions in 0..1."""

    loss: float
    top1: float
    top5: float
    num_samples: int
    num_failed: int


class AccuracyMeter:
    """Counts hits and sums losses on one rank's device; nothing waits for the device until `reduce`."""

    def __init__(self, device: torch.device) -> None:
        self.integers = torch.zeros(4, dtype=torch.int64, device=device)  # samples, top1, top5, failed
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, logits_NC: Tensor, losses_N: Tensor, labels_N: Tensor, valid_N: Tensor) -> Tensor:
        """Count one batch.

        Args:
            logits_NC: scores, any float type.
            losses_N: loss of each sample.
            labels_N: true classes, int64.
            valid_N: False for a sample whose file could not be read; it counts only as failed.
        Returns:
            (N, K) int64, the `TOP_K` most probable classes of each sample, the most probable first.
        """
        ranked_NK = logits_NC.topk(min(TOP_K, logits_NC.shape[1]), dim=1).indices
        hits_NK = (ranked_NK == labels_N[:, None]) & valid_N[:, None]
        num_valid = valid_N.sum()
        self.integers += torch.stack(
            [num_valid, hits_NK[:, 0].sum(), hits_NK.sum(), valid_N.numel() - num_valid]
        )
        self.loss_sum += (losses_N.double() * valid_N).sum()
        return ranked_NK

    def clear_if(self, skip: Tensor) -> None:
        """Set the counts to 0 where `skip`, a number on the device, is 1; the loss need not be finite."""
        self.integers.masked_fill_(skip.bool(), 0)
        self.loss_sum.masked_fill_(skip.bool(), 0.0)

    def clear(self) -> None:
        """Set the counts to 0."""
        self.integers.zero_()
        self.loss_sum.zero_()

    def copied(self) -> AccuracyMeter:
        """Return a meter with these counts, which stays as it is when this one counts on."""
        other = copy(self)
        other.integers, other.loss_sum = self.integers.clone(), self.loss_sum.clone()
        return other

    def merge(self, other: AccuracyMeter) -> None:
        """Add another meter's counts to these."""
        self.integers += other.integers
        self.loss_sum += other.loss_sum

    def reduce(self, world: World) -> Metrics:
        """Sum over the ranks and divide. Waits for the device; every rank must call it.

        Returns:
            The metrics of all ranks' samples; NaN if none could be read.
        """
        integers, loss_sum = self.integers.clone(), self.loss_sum.clone()
        world.all_reduce(integers, loss_sum)
        num_samples, top1, top5, failed = integers.tolist()
        size = num_samples or math.nan
        return Metrics(loss_sum.item() / size, top1 / size, top5 / size, num_samples, failed)


class ClassMeter:
    """Counts each pair of classes as `AccuracyMeter` does, and keeps the mistakes made with most confidence.

    Args:
        device: where the logits are.
        num_classes: C.
    """

    def __init__(self, device: torch.device, num_classes: int) -> None:
        self.confusion_CC = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)
        self.top5_C = torch.zeros(num_classes, dtype=torch.int64, device=device)
        self._probabilities_M = torch.zeros(0, dtype=torch.float32, device=device)
        self._mistakes_M3 = torch.zeros(0, 3, dtype=torch.int64, device=device)

    def add(
        self, logits_NC: Tensor, ranked_NK: Tensor, labels_N: Tensor, valid_N: Tensor, indices_N: Tensor
    ) -> None:
        """Count one batch.

        Args:
            logits_NC: scores, any float type.
            ranked_NK: from `AccuracyMeter.add`.
            labels_N: true classes, int64.
            valid_N: False for a sample whose file could not be read; it is not counted.
            indices_N: places of the samples in the split, int64.
        """
        counted_N, found_N = valid_N.long(), ranked_NK[:, 0]
        self.confusion_CC.view(-1).index_add_(0, labels_N * logits_NC.shape[1] + found_N, counted_N)
        hits_N = (ranked_NK == labels_N[:, None]).any(dim=1)
        self.top5_C.index_add_(0, labels_N, counted_N * hits_N)
        # A right answer stands behind every wrong one, so that no number of mistakes need be known here.
        wrong_N = valid_N & (found_N != labels_N)
        sure_N = torch.where(wrong_N, logits_NC.float().softmax(dim=1).amax(dim=1), -1.0).nan_to_num(-1.0)
        probabilities = torch.cat([self._probabilities_M, sure_N])
        mistakes = torch.cat([self._mistakes_M3, torch.stack([indices_N, labels_N, found_N], dim=1)])
        # Twice as many as are reported: what rounding makes equal is ordered by place in the end.
        best = probabilities.topk(min(2 * NUM_MISTAKES, len(probabilities))).indices
        self._probabilities_M, self._mistakes_M3 = probabilities[best], mistakes[best]

    def reduce(self, world: World, dataset: Dataset) -> tuple[ClassCounts, ClassReport]:
        """Sum over the ranks, and report under the names of a split's classes and files.

        Waits for the device; every rank must call it.
        """
        names, labels = (tuple(map(printable, texts)) for texts in (dataset.classes, dataset.class_labels))
        confusion_CC, top5_C = self.confusion_CC.clone(), self.top5_C.clone()
        world.all_reduce(confusion_CC, top5_C)
        counts = ClassCounts(confusion_CC.cpu().numpy(), top5_C.cpu().numpy())
        pairs = zip(self._probabilities_M.tolist(), self._mistakes_M3.tolist(), strict=True)
        own = [(probability, *mistake) for probability, mistake in pairs if probability >= 0]
        gathered = chain.from_iterable(world.gather_objects(own))
        mistakes = name_mistakes(gathered, names, lambda index: printable(dataset.name_at(index)))
        return counts, make_class_report(counts, names, labels, mistakes)
