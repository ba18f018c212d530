"""The flat-loss guard: detects a network that learns nothing, whose loss stays at that of guessing."""

from __future__ import annotations

import msgspec
import numpy as np
import numpy.typing as npt

from data_pipeline.datasets.dataset import Dataset
from train.config.schema import ModelConfig, RunConfig
from train.health.metrics import Metrics
from train.optim.class_weights import class_weights_of, counts_in_epoch

BELOW, ABOVE = 0.995, 1.05
"""A mean loss between these multiples of the level is flat. A network that learns falls below the lower one;
one that guesses cannot, and jitters above the level as its last biases follow each batch."""
NUM_WINDOWS = 10
"""Windows in the grace steps: the loss is averaged over a tenth of them, so that no single batch decides."""


class FlatLoss(msgspec.Struct, frozen=True, kw_only=True):
    """Counts for how long the loss has been flat; the same on all ranks, and part of a checkpoint.

    Attributes:
        since: optimiser steps finished when the loss was last not flat.
        window_start: steps finished when the current window began.
        samples, loss_sum: of the current window.
    """

    since: int = 0
    window_start: int = 0
    samples: int = 0
    loss_sum: float = 0.0

    @property
    def num_steps(self) -> int:
        """Number of steps with a flat loss, by the finished windows."""
        return self.window_start - self.since

    def after(self, step: int, metrics: Metrics, level: float, grace: int) -> FlatLoss:
        """Return the state after some more steps.

        Args:
            step: optimiser steps finished.
            metrics: of the training samples since the last call, over all ranks.
            level: the loss of guessing, from `flat_level`.
            grace: steps that the loss may be flat.
        """
        samples, loss_sum = self.samples + metrics.num_samples, self.loss_sum
        if metrics.num_samples:  # else the loss is NaN
            loss_sum += metrics.loss * metrics.num_samples
        if step - self.window_start < grace / NUM_WINDOWS or samples == 0:
            return msgspec.structs.replace(self, samples=samples, loss_sum=loss_sum)
        flat = BELOW * level <= loss_sum / samples <= ABOVE * level
        return FlatLoss(since=self.since if flat else step, window_start=step)


def flat_level(
    counts_C: npt.NDArray[np.float64],
    label_smoothing: float,
    weights_C: npt.NDArray[np.float64] | None = None,
) -> float:
    """Return the loss of the best guess without the image: ln(classes) if all are equally frequent.

    It is the entropy of the labels. Mixing samples does not change it; smoothing evens them out, and so may
    weights, with which the best guess is each class's share of the sum of weights.

    Args:
        counts_C: samples of each class.
        weights_C: of the classes in the loss; None where all weigh the same.

    >>> round(flat_level(np.ones(10), 0.1), 6) == round(float(np.log(10)), 6)
    True
    """
    shares_C = (1 - label_smoothing) * counts_C / max(counts_C.sum(), 1) + label_smoothing / len(counts_C)
    if weights_C is not None:
        shares_C = shares_C * weights_C
    seen = shares_C[shares_C > 0]
    guess = seen if weights_C is None else seen / seen.sum()
    return float(-(seen * np.log(guess)).sum())


def guess_loss(config: RunConfig, train_set: Dataset) -> float:
    """Return `flat_level` for a run's training loss."""
    weights_C = class_weights_of(config, train_set)
    return flat_level(counts_in_epoch(config, train_set), config.label_smoothing, weights_C)


def suggest_changes(model: ModelConfig) -> list[str]:
    """Suggest changes that may make a network learn that only guesses."""
    changes = []
    if model.init != "he":
        changes.append(f"model.init=he in place of {model.init}")
    if not model.has_batch_norm:
        changes.append("batch normalisation (model.name=bn)")
    return changes


def describe_flat(level: float, num_classes: int, num_steps: int, config: RunConfig) -> str:
    """Explain why the guard ends a run, and what to change."""
    advice = suggest_changes(config.model)
    advice.append(f"another schedule.learning_rate than {config.schedule.learning_rate:g}")
    return (
        f"the training loss has been within half a percent of {level:.4f} for {num_steps} steps. That is "
        f"what guessing among {num_classes} classes costs (ln({num_classes}) where all are as frequent): the "
        f"network learns nothing. Try {', or '.join(advice)}. flat_loss_grace={config.flat_loss_grace} is "
        "how many steps it may; 0 turns this check off"
    )
