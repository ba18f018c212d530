"""The exponential moving average of the weights (EMA), evaluated and exported in place of the last ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from data_pipeline.common.errors import CorruptFileError


class ModelEma:
    """Exponential moving average of a network's weights and running statistics, on their device.

    The decay is warmed up: min(decay, (1 + step) / (10 + step)).

    Args:
        network: whose current weights are the first average.
        decay: share of the average that a step keeps in the long run, 0..1: 0.999 averages about 1000 steps.
    Source: Polyak & Juditsky 1992; Szegedy et al. 2016, section 8; TensorFlow's ExponentialMovingAverage
        (the warm-up).
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.decay = decay
        self.values = {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}

    def share_at(self, step: int) -> float:
        """Return the share that the weights of a step have in their average, 0..1.

        Args:
            step: optimiser steps finished before this one.
        """
        return 1 - min(self.decay, (1 + step) / (10 + step))

    @torch.no_grad()
    def update(self, network: nn.Module, share: Tensor, skip: Tensor) -> None:
        """Average in the weights after a step, in place. Nothing waits for the device.

        Args:
            share: () float32, `share_at` this step, on the device.
            skip: (), 1 if the step was skipped: the average then stays unchanged, to the bit.
        """
        new = network.state_dict()
        floats = [name for name, value in self.values.items() if value.is_floating_point()]
        # A list of tensors: a single one would be read as a Python number, which waits for the device.
        shares = [share * (1 - skip)] * len(floats)
        torch._foreach_lerp_([self.values[n] for n in floats], [new[n] for n in floats], shares)
        for name in self.values.keys() - floats:  # counters
            self.values[name].copy_(new[name])

    @contextmanager
    def swapped_in(self, network: nn.Module) -> Iterator[None]:
        """Swap the average into the network, and its own weights back on every path."""
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
        """Restore a saved average.

        Raises:
            CorruptFileError: no average was saved, or that of another network.
        """
        shapes = {name: tensor.shape for name, tensor in self.values.items()}
        if {name: tensor.shape for name, tensor in values.items()} != shapes:
            raise CorruptFileError("the checkpoint has no average of these weights, as ema_decay asks for")
        for name, tensor in self.values.items():
            tensor.copy_(values[name])
