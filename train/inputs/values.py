"""The numbers of a step that differ from those of the step before, as tensors on the device.

Whatever a step computes from these alone, and from tensors that it changes in place, is the same list of
operations at every step: it can be captured once and replayed.

Shapes: L dropout layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from train.inputs.packed import place


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


Arrays = dict[str, npt.NDArray[Any]]


def value_arrays(
    step: int, rates: Sequence[float], average_share: float, keys_L2: npt.NDArray[np.int32]
) -> Arrays:
    """Return a step's numbers by the names that `values_of` reads; see `StepValues`."""
    return {
        "step": np.array(step, dtype=np.int64),
        "rates": np.array(rates, dtype=np.float32),
        "average_share": np.array(average_share, dtype=np.float32),
        "keys": keys_L2,
    }


def values_of(tensors: dict[str, Tensor]) -> StepValues:
    """Put a step's values together from the arrays of `value_arrays`, on the device."""
    return StepValues(tensors["step"], tensors["rates"].unbind(), tensors["average_share"], tensors["keys"])


def make_values(arrays: Arrays, device: torch.device) -> StepValues:
    """Move a step's numbers to a device, in one copy, without waiting for it."""
    return values_of(place(arrays, device))
