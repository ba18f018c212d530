"""A block between two convolutions as one step of autograd.

The passes over memory that remain, as bytes for each element x of the convolution's output, in a type of two
bytes. y is the block's output, d marks gradients; a pooled map has a quarter of the elements, and a byte of
index (i) for each. What has the size of parameters is not counted.

| block           | forward                     | backward                                   | saved   |
|-----------------|-----------------------------|--------------------------------------------|---------|
| ReLU            | x 2, y 2 = 4                | y 2, dy 2, dx 2 = 6                        | y       |
| ReLU, pool      | x 2, y i 0.75 = 2.75        | dy i 0.75, dx 2 = 2.75                     | i       |
| ReLU, LRN, pool | x 2, y i 0.75 = 2.75        | x 2, dy i 0.75, dx 2 = 4.75                | x, i    |
| BN and ReLU     | x 2, x 2, y 2 = 6           | x dy 4, x dy 4, dx 2 = 10                  | x       |
| the same, pool  | x 2, x 2, y i p 1.25 = 5.25 | dy i p 1.25, x 2, dy i 0.75, dx 2 = 6      | x, i, p |

Statistics of BN take a pass of their own, and so do the sums of its gradient. Of a pooled block those are
over its outputs: p is x where the window has its maximum. LRN's scale would take four bytes an element to
save, and is computed again. None of this has been measured on a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from train.kernels.block import BlockSpec, Saved
from train.kernels.interface import Kernels

# Shapes: N samples, C channels, H and W rows and columns of the input, Y and X of the output.


def fused_block(
    x_NCHW: Tensor, spec: BlockSpec, bias_C: Tensor | None, norm: _BatchNorm | None, kernels: Kernels
) -> Tensor:
    """Apply a block in training mode, and count a batch normalisation's statistics in.

    Args:
        x_NCHW: a convolution's output without its bias, float; other formats than channels_last are copied.
        bias_C: the convolution's bias, float32; None where it has none.
        norm: where the spec has batch normalisation.
    Returns:
        (N, C, Y, X) in the input's type, channels_last.
    Raises:
        ValueError: a single value a channel, which has no variance for batch normalisation.
    """
    if spec.has_batch_norm:
        assert norm is not None
        if x_NCHW.numel() == x_NCHW.shape[1]:
            raise ValueError(
                f"expected more than 1 value per channel when training, got input size {x_NCHW.shape}"
            )
    weight_C, norm_bias_C = (None, None) if norm is None else (norm.weight, norm.bias)
    out_NCYX: Tensor = _Block.apply(x_NCHW, bias_C, weight_C, norm_bias_C, norm, spec, kernels)
    return out_NCYX


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_NCHW: Tensor,
        bias_C: Tensor | None,
        weight_C: Tensor | None,
        norm_bias_C: Tensor | None,
        norm: _BatchNorm | None,
        spec: BlockSpec,
        kernels: Kernels,
    ) -> Tensor:
        x_NCHW = x_NCHW.contiguous(memory_format=torch.channels_last)
        with torch.autocast(x_NCHW.device.type, enabled=False):  # types are chosen here
            out_NCYX, saved = kernels.block_forward(spec, x_NCHW, bias_C, norm)
        ctx.save_for_backward(*vars(saved).values(), bias_C, weight_C, norm_bias_C)
        ctx.norm, ctx.spec, ctx.kernels, ctx.sides = norm, spec, kernels, x_NCHW.shape[2:]
        return out_NCYX

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # behind the last block the classifier flattens, and its gradient is not channels_last
        grad_NCYX = grads[0].contiguous(memory_format=torch.channels_last)
        *tensors, bias_C, _, _ = ctx.saved_tensors
        found = ctx.kernels.block_backward(ctx.spec, Saved(*tensors), grad_NCYX, bias_C, ctx.norm, ctx.sides)
        return found.x_NCHW, found.bias_C, found.norm_weight_C, found.norm_bias_C, None, None, None
