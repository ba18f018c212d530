"""How much arithmetic a network is, counted from its layers; nothing is computed."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import torch
from torch import Tensor, nn


class Flops(msgspec.Struct, frozen=True, kw_only=True):
    """Floating-point operations for one image: two for each multiply-add of convolutions and linear layers.

    Args:
        forward: of the forward pass.
        backward: gradients of weights and inputs; the first layer's input is the image and needs none.
    """

    forward: int
    backward: int

    @property
    def step(self) -> int:
        """Both passes. The update of the weights is left out: it is 1/100 of them."""
        return self.forward + self.backward


def count_flops(model: nn.Module, crop_px: int) -> Flops:
    """Count a network on the meta device, for one image.

    Args:
        model: any network of convolutions and linear layers, on the meta device; (N, 3, crop_px, crop_px) in.
        crop_px: side of the image.
    """
    counted: list[int] = []

    def count(module: nn.Module, _inputs: Any, output: Tensor) -> None:
        assert isinstance(module, nn.Conv2d | nn.Linear)
        places = math.prod(output.shape[2:]) if isinstance(module, nn.Conv2d) else 1
        counted.append(2 * module.weight.numel() * places)

    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    handles = [layer.register_forward_hook(count) for layer in layers]
    try:
        model(torch.empty(1, 3, crop_px, crop_px, device="meta"))
    finally:
        for handle in handles:
            handle.remove()
    return Flops(forward=sum(counted), backward=2 * sum(counted) - counted[0])
