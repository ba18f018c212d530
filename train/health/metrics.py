"""Exact accuracy: integers counted on the device, summed over the ranks, and divided once."""

from __future__ import annotations

import math
from copy import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from train.distributed.world import World

# Shapes: N samples, C classes, K of them.

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
