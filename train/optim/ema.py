"""The running average of the weights (EMA), which is evaluated and exported in place of the last ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from data_pipeline.common.errors import CorruptFileError


class ModelEma:
    """Exponential moving average of a network's weights and running statistics, on their device.

    Early on the average forgets faster, as if it had seen only what it has seen.

    Args:
        network: begins as its present weights.
        decay: share of the average that a step keeps in the long run, 0..1: 0.999 averages about 1000 steps.
    Source: Polyak & Juditsky 1992; Szegedy et al. 2016, section 8; TensorFlow's ExponentialMovingAverage
        (the beginning).
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.decay = decay
        self.values = {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}

    @torch.no_grad()
    def update(self, network: nn.Module, step: int, skip: Tensor) -> None:
        """Take in the weights after a step. Nothing waits for the device.

        Args:
            step: optimiser steps finished before this one.
            skip: (), 1 where the step was skipped: the average then stays as it is, to the bit.
        """
        keep = min(self.decay, (1 + step) / (10 + step))
        new = network.state_dict()
        floats = [name for name, value in self.values.items() if value.is_floating_point()]
        # One tensor for each: a single one would be taken for a number, which waits for the device.
        shares = [(1 - keep) * (1 - skip)] * len(floats)
        torch._foreach_lerp_([self.values[n] for n in floats], [new[n] for n in floats], shares)
        for name in self.values.keys() - floats:  # counters
            self.values[name].copy_(new[name])

    def statistics(self, network: nn.Module) -> list[Tensor]:
        """The averages of running statistics, which each rank gathers from its own samples."""
        return [self.values[name] for name, _ in network.named_buffers() if name in self.values]

    @contextmanager
    def in_place(self, network: nn.Module) -> Iterator[None]:
        """Let the network have the average for weights; its own come back on every path."""
        self._swap(network)
        try:
            yield
        finally:
            self._swap(network)

    @torch.no_grad()
    def _swap(self, network: nn.Module) -> None:
        for name, tensor in network.state_dict().items():
            own = tensor.clone()
            tensor.copy_(self.values[name])
            self.values[name].copy_(own)

    @torch.no_grad()
    def load(self, values: Mapping[str, Tensor]) -> None:
        """Go on from a saved average.

        Raises:
            CorruptFileError: none was saved, or that of another network.
        """
        shapes = {name: tensor.shape for name, tensor in self.values.items()}
        if {name: tensor.shape for name, tensor in values.items()} != shapes:
            raise CorruptFileError("the checkpoint has no average of these weights, as ema_decay asks for")
        for name, tensor in self.values.items():
            tensor.copy_(values[name])
