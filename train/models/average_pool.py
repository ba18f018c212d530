"""Adaptive average pooling whose gradient has the same bits each time, for `deterministic = true`.

torch's gradient on a GPU adds by atomics in an order of the moment, and raises where bits must repeat. Max
pooling needs nothing of the kind: on a GPU, as on a CPU, torch's gradient gathers, in either memory format.

Source: torch.use_deterministic_algorithms lists AdaptiveAvgPool2d, and not MaxPool2d; ATen,
native/cuda/DilatedMaxPool2d.cu.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d

# Shapes: N batch, C channels, H and W rows and columns of the map, S of the output.


class AveragePool(nn.AdaptiveAvgPool2d):
    """torch's `AdaptiveAvgPool2d`; where bits must repeat, with a gradient that is added up window by window.

    Shape:
        (N, C, H, W) -> (N, C, S, S), same type and memory format.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Average each window."""
        if not torch.are_deterministic_algorithms_enabled():
            return super().forward(input)
        if input.shape[2:] == self.output_size:  # each window is one pixel
            return input
        averaged: Tensor = _Average.apply(input, self.output_size)
        return averaged


class _Average(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, maps_NCHW: Tensor, sides: tuple[int, int]) -> Tensor:
        last = maps_NCHW.is_contiguous(memory_format=torch.channels_last)
        ctx.shape, ctx.format = maps_NCHW.shape, torch.channels_last if last else torch.contiguous_format
        return adaptive_avg_pool2d(maps_NCHW, sides)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad_NCSS,) = grads
        *_, height, width = ctx.shape
        grad_NCHW = grad_NCSS.new_zeros(ctx.shape).contiguous(memory_format=ctx.format)
        for row, (top, bottom) in enumerate(windows(height, grad_NCSS.shape[2])):
            for column, (left, right) in enumerate(windows(width, grad_NCSS.shape[3])):
                share = grad_NCSS[:, :, row, column, None, None] / (bottom - top) / (right - left)
                grad_NCHW[:, :, top:bottom, left:right] += share
        return grad_NCHW, None


def windows(length: int, count: int) -> Iterator[tuple[int, int]]:
    """Yield the first pixel of each of `count` windows over so many pixels, and the pixel behind its last.

    >>> list(windows(7, 3))
    [(0, 3), (2, 5), (4, 7)]
    """
    for number in range(count):
        yield number * length // count, -(-(number + 1) * length // count)
