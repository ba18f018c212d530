"""The weights in the autocast type, kept beside the float32 ones, so that no pass of a step casts them.

The optimiser's pass (`train.compile.update`) writes a copy along with its weight. Whatever else changes
weights, initialisation, loading, resuming or the average's swap, does it through torch, which counts the
changes of a tensor; so `refresh` knows on the host, without asking the device, which copies are stale, and
writes those again. torch's fused optimisers alone change weights uncounted: a hook counts their steps. A step
that is replayed as a graph calls `refresh` first.

The float32 weights stay the parameters, in the optimiser, in checkpoints and under DistributedDataParallel:
`half_of` gives the copy a place in a parameter's graph, and its gradient goes to the parameter.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


class HalfWeights:
    """Copies of the weights and biases of a network's convolutions and fully connected layers.

    Norms compute in float32 and have none.

    Args:
        network: on its device, in the memory format in which it trains.
        dtype: the autocast type.
        optimizer: of the network, whose own `step` may also change the weights.
    """

    def __init__(self, network: nn.Module, dtype: torch.dtype, optimizer: torch.optim.Optimizer) -> None:
        self.dtype = dtype
        optimizer.register_step_post_hook(_count_changes)
        layers = [module for module in network.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
        parameters: list[Tensor] = [p for layer in layers for p in layer.parameters(recurse=False)]
        self._copies = {p: torch.empty_like(p, dtype=dtype, requires_grad=False) for p in parameters}
        self._versions = dict.fromkeys(parameters, -1)
        self.refresh()

    def half_of(self, parameter: Tensor) -> Tensor:
        """Return a parameter's copy, through which gradients reach the parameter; itself if it has none.

        The gradient arrives in float32, by a cast of autograd's.
        """
        copy = self.copy_of(parameter)
        if copy is None:
            return parameter
        half: Tensor = _TakeHalf.apply(parameter, copy)
        return half

    def share(self, leaves: Mapping[Tensor, Tensor]) -> None:
        """Let tensors that stand for parameters in a pass have the parameters' copies."""
        copies = {leaf: self.copy_of(parameter) for leaf, parameter in leaves.items()}
        self._copies |= {leaf: copy for leaf, copy in copies.items() if copy is not None}

    def copy_of(self, parameter: Tensor) -> Tensor | None:
        """Return the tensor that holds a parameter's copy, for whoever writes it; None if it has none."""
        return self._copies.get(parameter)

    @torch.no_grad()
    def refresh(self) -> int:
        """Write the copies of parameters that changed since their copies were written.

        Returns:
            How many were written.
        """
        stale = [p for p, version in self._versions.items() if p._version != version]
        if stale:
            torch._foreach_copy_([self._copies[p] for p in stale], stale)
        for parameter in stale:
            self.mark_written(parameter)
        return len(stale)

    def mark_written(self, parameter: Tensor) -> None:
        """Take note that a parameter's copy was written along with it."""
        if parameter in self._versions:
            self._versions[parameter] = parameter._version


def _count_changes(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Count a step of torch's fused kernels as a change of its parameters, which they do not."""
    torch.autograd.graph.increment_version([p for group in optimizer.param_groups for p in group["params"]])


class _TakeHalf(torch.autograd.Function):
    """A parameter's value, read from its copy."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, copy: Tensor) -> Tensor:
        return copy.view_as(copy)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None
