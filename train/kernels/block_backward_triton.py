"""A block's backward pass by Triton: each pixel gathers from the up to four windows that may have chosen it.

`fused_block.py` has the traffic. Nothing is added by atomics: gradients of
parameters are sums of a part of the rows in each program, and then of the parts, in an order that follows
from the shapes alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from train.kernels.block import BlockSpec, Gradients, Saved, divide, empty_map
from train.kernels.block_forward_triton import (
    MERGED,
    bias_row,
    biased,
    lrn_scale,
    norm_rows,
    relu,
    to_the_minus,
)

# Shapes: N samples, C channels, H and W rows and columns of a convolution's output, Y and X of the block's,
# P parts that are added up by programs of their own; in kernels R rows.


@triton.jit
def gathered(
    grad_ptr, index_ptr, image, y, x, channel, inside_R, inside_C, channels, out_height, out_width,
    PADDING: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Add up the gradients of the windows that chose a pixel: two in each direction can contain it."""
    total = tl.zeros((ROWS, CHANNELS), tl.float32)
    last_y, last_x = (y + PADDING) // 2, (x + PADDING) // 2
    for window in tl.static_range(4):
        out_y, out_x = last_y - window // 2, last_x - window % 2
        in_y, in_x = y + PADDING - 2 * out_y, x + PADDING - 2 * out_x
        here_R = inside_R & (out_y >= 0) & (out_y < out_height) & (in_y < 3)
        here_R = here_R & (out_x >= 0) & (out_x < out_width) & (in_x < 3)
        here = here_R[:, None] & inside_C[None, :]
        row = ((image.to(tl.int64) * out_height + out_y) * out_width + out_x) * channels
        offset = row[:, None] + channel[None, :]
        chosen = tl.load(index_ptr + offset, mask=here, other=9).to(tl.int32)
        grad = tl.load(grad_ptr + offset, mask=here, other=0.0).to(tl.float32)
        total += tl.where(chosen == (in_y * 3 + in_x)[:, None], grad, 0.0)
    return total


@triton.jit
def window_sum(
    value, scratch_ptr, channel, channels, REACH: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr
):
    """Add up a window of channels, of which a program holds all.

    Neighbours go through a few kilobytes of each program in the card's cache: `tl.gather` compiles to 34
    exchanges between threads for each element.
    """
    row = scratch_ptr + (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None] * CHANNELS
    tl.debug_barrier()  # the last rows' neighbours have been read
    tl.store(row + channel[None, :], value)
    tl.debug_barrier()
    total = value
    for shift in tl.static_range(-REACH, REACH + 1):
        if shift != 0:
            other = (channel + shift)[None, :]
            total += tl.load(row + other, mask=(other >= 0) & (other < channels), other=0.0)
    return total


@triton.jit
def input_gradient_kernel(
    x_ptr, grad_ptr, index_ptr, out_ptr, bias_ptr, mean_ptr, rstd_ptr, weight_ptr, shift_ptr, sums_ptr,
    dx_ptr, parts_ptr, scratch_ptr, num_rows, channels, height, width, out_height, out_width,
    NORM: tl.constexpr, POOL: tl.constexpr, PADDING: tl.constexpr, FACTOR: tl.constexpr, BETA: tl.constexpr,
    K: tl.constexpr, REACH: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Compute the gradient of the block's input, `ROWS` pixels at a time, and a part of that of its bias."""
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside_C = channel < channels
    if NORM == "bn" or NORM == "bn_after_relu":
        mean, rstd, scale, shift = norm_rows(mean_ptr, rstd_ptr, weight_ptr, shift_ptr, channel, inside_C)
        mean_grad = tl.load(sums_ptr + channel, mask=inside_C, other=0.0)[None, :] / num_rows
        mean_dot = tl.load(sums_ptr + channels + channel, mask=inside_C, other=0.0)[None, :] / num_rows
    bias = bias_row(bias_ptr, channel, inside_C)
    total = tl.zeros((ROWS, CHANNELS), tl.float32)
    for first in range(tl.program_id(0) * ROWS, num_rows, tl.num_programs(0) * ROWS):
        pixel = first + tl.arange(0, ROWS)
        inside_R = pixel < num_rows
        inside = inside_R[:, None] & inside_C[None, :]
        row = pixel.to(tl.int64) * channels
        offset = row[:, None] + channel[None, :]
        if POOL:
            image, y, x = pixel // (height * width), pixel // width % height, pixel % width
            grad = gathered(
                grad_ptr, index_ptr, image, y, x, channel, inside_R, inside_C, channels, out_height,
                out_width, PADDING, ROWS, CHANNELS,
            )  # fmt: skip
        else:
            grad = tl.load(grad_ptr + offset, mask=inside, other=0.0).to(tl.float32)
        if NORM == "none":
            if not POOL:  # the byte stands for it
                grad = tl.where(
                    tl.load(out_ptr + offset, mask=inside, other=0.0).to(tl.float32) <= 0, 0.0, grad
                )
        else:
            value = biased(x_ptr, offset, bias, inside)
            dead = value <= 0
            if NORM == "lrn":
                value = relu(value)
                scales = lrn_scale(x_ptr, bias_ptr, row, channel, inside_R, channels, value, FACTOR, K, REACH)
                grad *= to_the_minus(scales, BETA)
                inner = window_sum(
                    grad * value / scales, scratch_ptr, channel, channels, REACH, ROWS, CHANNELS
                )
                grad -= 2 * BETA * FACTOR * value * inner
            else:
                if NORM == "bn":
                    dead = (value - mean) * scale + shift <= 0
                    if not POOL:
                        grad = tl.where(dead, 0.0, grad)
                else:
                    value = relu(value)
                grad = (grad - mean_grad - (value - mean) * rstd * mean_dot) * scale
            if NORM != "bn":
                grad = tl.where(dead, 0.0, grad)
        tl.store(dx_ptr + offset, grad.to(dx_ptr.dtype.element_ty), mask=inside)
        if parts_ptr is not None:
            total += tl.where(inside, grad, 0.0)
    if parts_ptr is not None:
        tl.store(parts_ptr + tl.program_id(0) * channels + channel, tl.sum(total, 0), mask=inside_C)


@triton.jit
def norm_sums_kernel(
    value_ptr, grad_ptr, index_ptr, bias_ptr, mean_ptr, rstd_ptr, weight_ptr, shift_ptr, parts_ptr,
    num_rows, channels,
    NORM: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Add up a part of the gradients of a norm's bias and weight.

    Args:
        value_ptr: the peaks of pooled outputs, else the map.
        index_ptr: the bytes of pooled outputs, else None.
    """
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside_C = channel < channels
    mean, rstd, scale, shift = norm_rows(mean_ptr, rstd_ptr, weight_ptr, shift_ptr, channel, inside_C)
    bias = bias_row(bias_ptr, channel, inside_C)
    grads = tl.zeros((ROWS, CHANNELS), tl.float32)
    dots = tl.zeros((ROWS, CHANNELS), tl.float32)
    for first in range(tl.program_id(0) * ROWS, num_rows, tl.num_programs(0) * ROWS):
        row = first + tl.arange(0, ROWS)
        inside = (row < num_rows)[:, None] & inside_C[None, :]
        offset = row.to(tl.int64)[:, None] * channels + channel[None, :]
        value = biased(value_ptr, offset, bias, inside)
        grad = tl.load(grad_ptr + offset, mask=inside, other=0.0).to(tl.float32)
        if NORM == "bn_after_relu":
            value = relu(value)
        elif index_ptr is not None:
            grad = tl.where(tl.load(index_ptr + offset, mask=inside, other=9).to(tl.int32) == 9, 0.0, grad)
        else:
            grad = tl.where((value - mean) * scale + shift <= 0, 0.0, grad)
        grads += grad
        dots += grad * (value - mean) * rstd
    part = tl.program_id(0) * 2 * channels + channel
    tl.store(parts_ptr + part, tl.sum(grads, 0), mask=inside_C)
    tl.store(parts_ptr + part + channels, tl.sum(dots, 0), mask=inside_C)


@triton.jit
def add_parts_kernel(parts_ptr, out_ptr, num_parts, length, PARTS: tl.constexpr, LENGTH: tl.constexpr):
    """Add up the rows of (P, length)."""
    column = tl.program_id(0) * LENGTH + tl.arange(0, LENGTH)
    inside = column < length
    total = tl.zeros((PARTS, LENGTH), tl.float32)
    for first in range(0, num_parts, PARTS):
        part = first + tl.arange(0, PARTS)
        mask = (part < num_parts)[:, None] & inside[None, :]
        total += tl.load(parts_ptr + part[:, None] * length + column[None, :], mask=mask, other=0.0)
    tl.store(out_ptr + column, tl.sum(total, 0), mask=inside)


def add_parts(parts_PL: Tensor) -> Tensor:
    """Add up the parts: (P, L) -> (L), float32, in one launch."""
    num_parts, length = parts_PL.shape
    out_L = parts_PL.new_empty(length)
    add_parts_kernel[(triton.cdiv(length, 32),)](parts_PL, out_L, num_parts, length, PARTS=MERGED, LENGTH=32)
    return out_L


def norm_sums(
    spec: BlockSpec, saved: Saved, grad_NCYX: Tensor, bias_C: Tensor | None, norm: _BatchNorm
) -> Tensor:
    """Return the gradients of a norm's bias and weight: (2, C), in two launches."""
    values = saved.peaks_NCYX if spec.pool else saved.x_NCHW
    channels = grad_NCYX.shape[1]
    grid, num_rows, rows, size = divide(grad_NCYX)
    parts_PL = norm.weight.new_empty(grid[0], 2 * channels)
    norm_sums_kernel[grid](
        values, grad_NCYX, saved.index_NCYX, bias_C, saved.mean_C, saved.rstd_C, norm.weight, norm.bias,
        parts_PL, num_rows, channels, NORM=spec.norm, ROWS=rows, CHANNELS=size,
    )  # fmt: skip
    return add_parts(parts_PL).view(2, channels)


def backward(
    spec: BlockSpec,
    saved: Saved,
    grad_NCYX: Tensor,
    bias_C: Tensor | None,
    norm: _BatchNorm | None,
    sides: torch.Size,
) -> Gradients:
    """Compute the gradients of a block from that of its output.

    One launch for x, one for a bias, two for a norm.

    Args:
        saved: of the forward pass.
        grad_NCYX: of the output, in its type.
        bias_C, norm: as they were in the forward pass.
        sides: (H, W) of the input.
    """
    channels, *out_sides = grad_NCYX.shape[1:]
    sums_2C = None if norm is None else norm_sums(spec, saved, grad_NCYX, bias_C, norm)
    dx_NCHW = empty_map(grad_NCYX, sides, grad_NCYX.dtype)
    grid, num_rows, rows, size = divide(dx_NCHW, whole_row=spec.norm == "lrn")
    parts_PC = None if bias_C is None else bias_C.new_empty(grid[0], channels)
    scratch = None
    if spec.norm == "lrn":
        scratch = grad_NCYX.new_empty(grid[0] * rows * size, dtype=torch.float32)
    input_gradient_kernel[grid](
        saved.x_NCHW, grad_NCYX, saved.index_NCYX, saved.out_NCHW, bias_C, saved.mean_C, saved.rstd_C,
        None if norm is None else norm.weight, None if norm is None else norm.bias, sums_2C, dx_NCHW,
        parts_PC, scratch, num_rows, channels, *sides, *out_sides,
        NORM=spec.norm, POOL=spec.pool, PADDING=spec.pool_padding, FACTOR=spec.lrn_alpha / spec.lrn_size,
        BETA=spec.lrn_beta, K=spec.lrn_k, REACH=spec.lrn_size // 2, ROWS=rows, CHANNELS=size,
    )  # fmt: skip
    of_bias_C = None if parts_PC is None else add_parts(parts_PC)
    if sums_2C is None:
        return Gradients(dx_NCHW, of_bias_C)
    return Gradients(dx_NCHW, of_bias_C, sums_2C[1], sums_2C[0])
