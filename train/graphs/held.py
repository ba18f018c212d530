"""A run's state put aside, so that steps can be tried on it: it comes back to the bit, in place."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from train.step import StepParts


class Held:
    """A copy of all that a step changes: weights, momenta, statistics, average, guard, loss scale.

    Gradients are no state: they are whatever the last step left.
    """

    def __init__(self, parts: StepParts) -> None:
        self._parts = parts
        self.tensors = {name: tensor.detach().clone() for name, tensor in state_of(parts).items()}
        self._scale = copy.deepcopy(parts.scaler.state_dict())
        self._rates = [group["lr"] for group in parts.optimizer.param_groups]

    @torch.no_grad()
    def restore(self) -> None:
        """Write the copy back. Tensors stay where they are, as captured work needs it."""
        for name, tensor in state_of(self._parts).items():
            tensor.copy_(self.tensors[name])
        if self._scale:
            self._parts.scaler.load_state_dict(self._scale)
            self._parts.scaler._per_optimizer_states.clear()  # of a step that ended with an error
        for group, rate in zip(self._parts.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate

    def changed(self) -> list[str]:
        """Name what is not what it was when it was put aside, by its bits. Waits for the device."""
        now = state_of(self._parts)
        return [name for name, tensor in now.items() if not same_bits(tensor, self.tensors[name])]


def state_of(parts: StepParts) -> dict[str, Tensor]:
    """Return the tensors that a step changes in place, by name for people."""
    network, optimizer = parts.network, parts.optimizer
    names: dict[Tensor, str] = {parameter: name for name, parameter in network.named_parameters()}
    tensors: dict[str, Any] = {f"weights {name}": p for name, p in network.named_parameters()}
    tensors |= {f"statistics {name}": buffer for name, buffer in network.named_buffers()}
    for parameter, state in optimizer.state.items():
        tensors |= {f"momentum {names[parameter]}": v for v in state.values() if isinstance(v, Tensor)}
    if parts.ema is not None:
        tensors |= {f"average {name}": value for name, value in parts.ema.values.items()}
    tensors |= {f"guard's {name}": value for name, value in parts.guard.state_dict().items()}
    return tensors


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors have the same bits; NaN equals itself."""
    as_bytes = (tensor.detach().reshape(-1).view(torch.uint8) for tensor in (one, other))
    return torch.equal(*as_bytes)
