"""Fast steps for tests on a CPU: the plain step, and the plain step with something wrong with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from data_pipeline.loading.batches import Batch
from train.graphs.trial import Candidate
from train.health.metrics import AccuracyMeter
from train.step import StepParts, train_step


class Fast:
    """The plain step by another name.

    Attributes:
        seconds: that a timer of tests reads, see `read_seconds`.
    """

    seconds = 0.5

    def __init__(self, parts: StepParts) -> None:
        self.parts, self.calls = parts, 0

    def __call__(self, batches: Sequence[Batch], learning_rate: float, step: int) -> AccuracyMeter:
        self.calls += 1
        return self.run(batches, learning_rate, step)

    def run(self, batches: Sequence[Batch], learning_rate: float, step: int) -> AccuracyMeter:
        return train_step(self.parts, batches, learning_rate, step)


class WrongGradient(Fast):
    """A gradient is a percent too large."""

    NAME = "features.3.weight"

    def run(self, batches: Sequence[Batch], learning_rate: float, step: int) -> AccuracyMeter:
        parameter: Any = self.parts.network.get_parameter(self.NAME)
        handle = parameter.register_hook(lambda grad: grad * 1.01)
        try:
            return super().run(batches, learning_rate, step)
        finally:
            handle.remove()


class MissingGradient(Fast):
    """A gradient is not computed."""

    def run(self, batches: Sequence[Batch], learning_rate: float, step: int) -> AccuracyMeter:
        meter = super().run(batches, learning_rate, step)
        self.parts.network.get_parameter(WrongGradient.NAME).grad = None
        return meter


class WrongRate(Fast):
    """The update is a percent too large."""

    def run(self, batches: Sequence[Batch], learning_rate: float, step: int) -> AccuracyMeter:
        return super().run(batches, learning_rate * 1.01, step)


class IgnoresNaN(Fast):
    """A step whose gradient is not finite is not skipped."""

    def run(self, batches: Sequence[Batch], learning_rate: float, step: int) -> AccuracyMeter:
        with mock.patch.object(self.parts.guard, "should_skip", lambda gradients, at: torch.zeros(())):
            return super().run(batches, learning_rate, step)


class CountsOtherwise(Fast):
    """A skipped step is counted among the samples."""

    def run(self, batches: Sequence[Batch], learning_rate: float, step: int) -> AccuracyMeter:
        with mock.patch.object(AccuracyMeter, "clear_if", lambda meter, skip: None):
            return super().run(batches, learning_rate, step)


class Raises(Fast):
    """The fourth call fails, in which a graph is captured, between the loss scale's two calls."""

    error: Exception = RuntimeError("out of registers")

    def run(self, batches: Sequence[Batch], learning_rate: float, step: int) -> AccuracyMeter:
        if self.calls < 4:
            return super().run(batches, learning_rate, step)

        def fail(gradients: Sequence[Tensor], at: object) -> Tensor:
            raise self.error

        with mock.patch.object(self.parts.guard, "should_skip", fail):
            return super().run(batches, learning_rate, step)


class Slow(Fast):
    """It is right, and slower than the plain step."""

    seconds = 3.0


def candidate(kind: type[Fast]) -> Candidate:
    """Builders of steps, by the names of their classes."""
    return Candidate(kind.__name__, kind)


def read_seconds(step: object, *_: object) -> float:
    """The seconds that a step says it takes; 2 for the plain one."""
    return step.seconds if isinstance(step, Fast) else 2.0
