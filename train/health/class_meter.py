"""Counts of each pair of classes, collected on the device, and the mistakes made with most confidence."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain

import torch
from torch import Tensor

from data_pipeline.common.class_report import (
    NUM_MISTAKES,
    ClassCounts,
    ClassReport,
    make_class_report,
    name_mistakes,
)
from train.distributed.world import World

# Shapes: N samples of one batch, C classes, K of them, M mistakes.


class ClassMeter:
    """Counts on one rank's device; nothing waits for the device until `reduce`.

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
            ranked_NK: see `train.health.metrics.AccuracyMeter.add`.
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

    def reduce(
        self, world: World, names: tuple[str, ...], labels: tuple[str, ...], path_at: Callable[[int], str]
    ) -> tuple[ClassCounts, ClassReport]:
        """Sum over the ranks and report. Waits for the device; every rank must call it.

        Args:
            names, labels: of the C classes.
            path_at: the file at a place in the split, for people.
        """
        confusion_CC, top5_C = self.confusion_CC.clone(), self.top5_C.clone()
        world.all_reduce(confusion_CC, top5_C)
        counts = ClassCounts(confusion_CC.cpu().numpy(), top5_C.cpu().numpy())
        pairs = zip(self._probabilities_M.tolist(), self._mistakes_M3.tolist(), strict=True)
        own = [(probability, *mistake) for probability, mistake in pairs if probability >= 0]
        gathered = chain.from_iterable(world.gather_objects(own))
        return counts, make_class_report(counts, names, labels, name_mistakes(gathered, names, path_at))
