"""The numbers of a step that differ from those of the step before, as tensors on the device.

Whatever a step computes from these alone, and from tensors that it changes in place, is the same list of
operations at every step: it can be captured once and replayed.

Shapes: L dropout layers.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class StepValues:
    """The numbers of one step.

    Attributes:
        step: () int64, optimiser steps finished before this one.
        rates: () float32 for each of the optimiser's parameter groups, learning rates.
        average_share: () float32, of the new weights in their average.
        keys: (L, 2) int32, of which dropout's masks are a function.
    """

    step: Tensor
    rates: tuple[Tensor, ...]
    average_share: Tensor
    keys: Tensor


def values_of(tensors: dict[str, Tensor]) -> StepValues:
    """Put a step's values together from the arrays of `train.step.start_values`, on the device."""
    return StepValues(tensors["step"], tensors["rates"].unbind(), tensors["average_share"], tensors["keys"])
