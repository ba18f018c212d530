"""LRN alone, for `alexnet bench train`: ours, fused and not, beside torch's."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from train.bench.harness import time_calls
from train.bench.trainer import wait_for
from train.distributed.numerics import exact_float32
from train.distributed.world import cpu_share
from train.models.lrn import LocalResponseNorm

LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
CHANNELS = 96
"""Of the first LRN of `paper`."""


class LrnCase:
    """The first LRN of `paper`, in float32, both memory formats and three forms.

    Args:
        stack: restores torch's settings.
        batch: images.
        side: of their maps.
        device: `cpu` or `cuda`.
    """

    def __init__(self, stack: ExitStack, batch: int, side: int, device: Literal["cpu", "cuda"]) -> None:
        if device == "cpu":
            torch.set_num_threads(cpu_share(1))
        stack.enter_context(exact_float32())
        fused = LocalResponseNorm()
        fused.fused = True
        self.modules = {
            "torch": nn.LocalResponseNorm(5, 1e-4, 0.75, 2.0),
            "eager": LocalResponseNorm(),
            "fused": fused,
        }
        generator = torch.Generator(device=device).manual_seed(0)
        x = torch.randn(batch, CHANNELS, side, side, device=device, generator=generator)
        self.leaves = {
            layout: x.contiguous(memory_format=memory_format).requires_grad_()
            for layout, memory_format in LAYOUTS.items()
        }
        self.measure()  # compiles

    def measure(self) -> dict[str, dict[str, float]]:
        """The shorter of two times, forward and backward, in seconds by memory format and form."""
        return {
            layout: {
                form: min(
                    time_calls(partial(pass_both_ways, module, leaf), 2, partial(wait_for, leaf.device))
                )
                for form, module in self.modules.items()
            }
            for layout, leaf in self.leaves.items()
        }


def pass_both_ways(module: nn.Module, leaf: Tensor) -> None:
    """Run a module forward and backward."""
    leaf.grad = None
    torch.autograd.backward(module(leaf), leaf.detach())
