"""A block's forward pass by Triton: statistics of batch normalisation, then everything else in one kernel.

`fused_block.py` has the traffic. A map is read as rows of C channels, one for each
pixel (channels_last). Sums are in float32, in an order that follows from the shapes alone: so bits repeat.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from train.kernels.block import BlockSpec, Saved, divide, empty_map

# Shapes: N samples, C channels, H and W rows and columns of a convolution's output, Y and X of the block's,
# P parts that are added up by programs of their own; in kernels R rows.

MERGED = 64
"""Parts that are merged at once."""


@triton.jit
def bias_row(bias_ptr, channel, inside_C):
    """Load channels' biases as a row; 0 where there is none."""
    row = 0.0
    if bias_ptr is not None:
        row = tl.load(bias_ptr + channel, mask=inside_C, other=0.0)[None, :]
    return row


@triton.jit
def biased(x_ptr, offset, bias, inside):
    """Load x in float32, and add its channel's bias."""
    return tl.load(x_ptr + offset, mask=inside, other=0.0).to(tl.float32) + bias


@triton.jit
def norm_rows(mean_ptr, rstd_ptr, weight_ptr, shift_ptr, channel, inside_C):
    """Load what normalises channels, as rows: mean, 1 / deviation, and the factor and addend that follow."""
    mean = tl.load(mean_ptr + channel, mask=inside_C, other=0.0)[None, :]
    rstd = tl.load(rstd_ptr + channel, mask=inside_C, other=0.0)[None, :]
    scale = rstd * tl.load(weight_ptr + channel, mask=inside_C, other=0.0)[None, :]
    shift = tl.load(shift_ptr + channel, mask=inside_C, other=0.0)[None, :]
    return mean, rstd, scale, shift


@triton.jit
def relu(value):
    """ReLU that keeps what is not a number."""
    return tl.where(value <= 0, 0.0, value)


@triton.jit
def lrn_scale(x_ptr, bias_ptr, row, channel, inside_R, channels, value, FACTOR, K, REACH: tl.constexpr):
    """LRN's scale: k + alpha / size times the squares of a window of channels.

    The neighbours are loaded again, from the cache: cheaper than an exchange between threads.
    """
    total = value * value
    for shift in tl.static_range(-REACH, REACH + 1):
        if shift != 0:
            other = channel + shift
            inside_C = (other >= 0) & (other < channels)
            inside = inside_R[:, None] & inside_C[None, :]
            bias = bias_row(bias_ptr, other, inside_C)
            near = relu(biased(x_ptr, row[:, None] + other[None, :], bias, inside))
            total += near * near
    return K + FACTOR * total


@triton.jit
def to_the_minus(scale, BETA: tl.constexpr):
    """A scale to the power of -beta; two roots are cheaper than a power."""
    if BETA == 0.75:
        root = tl.rsqrt(scale)
        return tl.sqrt(root) * root
    return tl.exp2(tl.log2(scale) * -BETA)


@triton.jit
def block_kernel(
    x_ptr, bias_ptr, mean_ptr, rstd_ptr, weight_ptr, shift_ptr, out_ptr, index_ptr, peaks_ptr,
    num_outputs, channels, height, width, out_height, out_width,
    NORM: tl.constexpr, POOL: tl.constexpr, PADDING: tl.constexpr, FACTOR: tl.constexpr, BETA: tl.constexpr,
    K: tl.constexpr, REACH: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Compute `ROWS` pixels of the output, in `CHANNELS` channels, with their bytes and peaks."""
    pixel = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside_R, inside_C = pixel < num_outputs, channel < channels
    image, out_y, out_x = (
        pixel // (out_height * out_width),
        pixel // out_width % out_height,
        pixel % out_width,
    )
    if NORM == "bn" or NORM == "bn_after_relu":
        mean, _, scale, shift = norm_rows(mean_ptr, rstd_ptr, weight_ptr, shift_ptr, channel, inside_C)
    bias = bias_row(bias_ptr, channel, inside_C)
    best = tl.full((ROWS, CHANNELS), float("-inf"), tl.float32)
    peak = tl.zeros((ROWS, CHANNELS), tl.float32)
    index = tl.zeros((ROWS, CHANNELS), tl.int32)
    for place in range(9 if POOL else 1):
        if POOL:
            y, x = out_y * 2 - PADDING + place // 3, out_x * 2 - PADDING + place % 3
        else:
            y, x = out_y, out_x
        here_R = inside_R & (y >= 0) & (y < height) & (x >= 0) & (x < width)
        row = ((image.to(tl.int64) * height + y) * width + x) * channels
        here = here_R[:, None] & inside_C[None, :]
        value = biased(x_ptr, row[:, None] + channel[None, :], bias, here)
        if peaks_ptr is not None:
            raw = tl.load(x_ptr + row[:, None] + channel[None, :], mask=here, other=0.0).to(tl.float32)
        if NORM == "bn":
            value = (value - mean) * scale + shift
        value = relu(value)
        if NORM == "lrn":
            scales = lrn_scale(x_ptr, bias_ptr, row, channel, here_R, channels, value, FACTOR, K, REACH)
            value = value * to_the_minus(scales, BETA)
        if NORM == "bn_after_relu":
            value = (value - mean) * scale + shift
        # what is compared is what would be written, so that the first of equal ones wins
        value = value.to(out_ptr.dtype.element_ty).to(tl.float32)
        better = here & ((value > best) | (value != value))
        best = tl.where(better, value, best)
        if POOL:
            index = tl.where(better, place, index)
        if peaks_ptr is not None:
            peak = tl.where(better, raw, peak)
    offset = pixel.to(tl.int64)[:, None] * channels + channel[None, :]
    inside = inside_R[:, None] & inside_C[None, :]
    tl.store(out_ptr + offset, best.to(out_ptr.dtype.element_ty), mask=inside)
    if POOL:
        if NORM != "bn_after_relu":
            index = tl.where(best <= 0, 9, index)
        tl.store(index_ptr + offset, index.to(tl.uint8), mask=inside)
    if peaks_ptr is not None:
        tl.store(peaks_ptr + offset, peak.to(peaks_ptr.dtype.element_ty), mask=inside)


@triton.jit
def statistics_kernel(
    x_ptr, bias_ptr, means_ptr, squares_ptr, counts_ptr, num_rows, channels,
    RELU: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Compute a part's mean, sum of squares about it, and number of pixels.

    Each lane keeps its own (Welford 1962), and the lanes are merged at the end (Chan et al. 1979).
    """
    part, num_parts = tl.program_id(0), tl.num_programs(0)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside_C = channel < channels
    bias = bias_row(bias_ptr, channel, inside_C)
    mean = tl.zeros((ROWS, CHANNELS), tl.float32)
    squares = tl.zeros((ROWS, CHANNELS), tl.float32)
    count_R = tl.zeros((ROWS,), tl.float32)
    for first in range(part * ROWS, num_rows, num_parts * ROWS):
        row = first + tl.arange(0, ROWS)
        inside_R = row < num_rows
        offset = row.to(tl.int64)[:, None] * channels + channel[None, :]
        inside = inside_R[:, None] & inside_C[None, :]
        value = biased(x_ptr, offset, bias, inside)
        if RELU:
            value = relu(value)
        count_R += inside_R.to(tl.float32)
        away = value - mean
        step = away / tl.maximum(count_R, 1.0)[:, None]
        mean = tl.where(inside, mean + step, mean)
        squares = tl.where(inside, squares + away * (value - mean), squares)
    count = tl.sum(count_R)
    middle_C = tl.sum(mean * count_R[:, None], 0) / count
    away = mean - middle_C[None, :]
    squares_C = tl.sum(squares + away * away * count_R[:, None], 0)
    tl.store(means_ptr + part * channels + channel, middle_C, mask=inside_C)
    tl.store(squares_ptr + part * channels + channel, squares_C, mask=inside_C)
    tl.store(counts_ptr + part, count)


@triton.jit
def merge_kernel(
    means_ptr, squares_ptr, counts_ptr, mean_ptr, rstd_ptr, running_mean_ptr, running_variance_ptr,
    batches_ptr, num_parts, channels,
    EPS: tl.constexpr, MOMENTUM: tl.constexpr, PARTS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Merge the parts' statistics, and count them in."""
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    inside_C = channel < channels
    sums = tl.zeros((PARTS, CHANNELS), tl.float32)
    counts = tl.zeros((PARTS,), tl.float32)
    for first in range(0, num_parts, PARTS):
        part = first + tl.arange(0, PARTS)
        inside = (part < num_parts)[:, None] & inside_C[None, :]
        count = tl.load(counts_ptr + part, mask=part < num_parts, other=0.0)
        means = tl.load(means_ptr + part[:, None] * channels + channel[None, :], mask=inside, other=0.0)
        sums += means * count[:, None]
        counts += count
    total = tl.sum(counts)
    mean = tl.sum(sums, 0) / total
    sums = tl.zeros((PARTS, CHANNELS), tl.float32)
    for first in range(0, num_parts, PARTS):
        part = first + tl.arange(0, PARTS)
        inside = (part < num_parts)[:, None] & inside_C[None, :]
        offset = part[:, None] * channels + channel[None, :]
        count = tl.load(counts_ptr + part, mask=part < num_parts, other=0.0)
        away = tl.load(means_ptr + offset, mask=inside, other=0.0) - mean[None, :]
        sums += tl.load(squares_ptr + offset, mask=inside, other=0.0) + away * away * count[:, None]
    squares = tl.sum(sums, 0)
    tl.store(mean_ptr + channel, mean, mask=inside_C)
    tl.store(rstd_ptr + channel, 1.0 / tl.sqrt_rn(squares / total + EPS), mask=inside_C)
    old = tl.load(running_mean_ptr + channel, mask=inside_C)
    tl.store(running_mean_ptr + channel, old + MOMENTUM * (mean - old), mask=inside_C)
    old = tl.load(running_variance_ptr + channel, mask=inside_C)
    new = squares / (total - 1)
    tl.store(running_variance_ptr + channel, old + MOMENTUM * (new - old), mask=inside_C)
    if tl.program_id(0) == 0:
        tl.store(batches_ptr, tl.load(batches_ptr) + 1)


def statistics(
    spec: BlockSpec, x_NCHW: Tensor, bias_C: Tensor | None, norm: _BatchNorm
) -> tuple[Tensor, Tensor]:
    """Return mean and 1 / standard deviation of each channel, and count them in: two launches."""
    channels = x_NCHW.shape[1]
    grid, num_rows, rows, size = divide(x_NCHW)
    parts_2PC = norm.weight.new_empty(2, grid[0], channels)
    counts_P = norm.weight.new_empty(grid[0])
    statistics_kernel[grid](
        x_NCHW, bias_C, parts_2PC[0], parts_2PC[1], counts_P, num_rows, channels,
        RELU=spec.norm == "bn_after_relu", ROWS=rows, CHANNELS=size,
    )  # fmt: skip
    mean_C, rstd_C = torch.empty_like(norm.weight), torch.empty_like(norm.weight)
    merge_kernel[(triton.cdiv(channels, 32),)](
        parts_2PC[0], parts_2PC[1], counts_P, mean_C, rstd_C,
        norm.running_mean, norm.running_var, norm.num_batches_tracked, grid[0], channels,
        EPS=norm.eps, MOMENTUM=norm.momentum, PARTS=MERGED, CHANNELS=32,
    )  # fmt: skip
    return mean_C, rstd_C


def forward(
    spec: BlockSpec, x_NCHW: Tensor, bias_C: Tensor | None, norm: _BatchNorm | None
) -> tuple[Tensor, Saved]:
    """Compute a block's output, and what its backward pass needs; update the running statistics.

    One launch, and two before it with batch normalisation.

    Args:
        x_NCHW: the convolution's output without its bias, at least one sample, channels_last.
        bias_C: the convolution's bias, if it has one.
        norm: where the spec has batch normalisation.
    Returns:
        (N, C, Y, X) in the input's type, channels_last; the saved tensors.
    """
    channels, height, width = x_NCHW.shape[1:]
    out_sides = spec.out_sides(height, width)
    mean_C = rstd_C = index_NCYX = peaks_NCYX = None
    if norm is not None:
        mean_C, rstd_C = statistics(spec, x_NCHW, bias_C, norm)
    out_NCYX = empty_map(x_NCHW, out_sides, x_NCHW.dtype)
    if spec.pool:
        index_NCYX = empty_map(x_NCHW, out_sides, torch.uint8)
        peaks_NCYX = None if norm is None else torch.empty_like(out_NCYX)
    (_, num_blocks), num_outputs, rows, size = divide(out_NCYX)
    block_kernel[(triton.cdiv(num_outputs, rows), num_blocks)](
        x_NCHW, bias_C, mean_C, rstd_C,
        None if norm is None else norm.weight, None if norm is None else norm.bias,
        out_NCYX, index_NCYX, peaks_NCYX, num_outputs, channels, height, width, *out_sides,
        NORM=spec.norm, POOL=spec.pool, PADDING=spec.pool_padding, FACTOR=spec.lrn_alpha / spec.lrn_size,
        BETA=spec.lrn_beta, K=spec.lrn_k, REACH=spec.lrn_size // 2, ROWS=rows, CHANNELS=size,
    )  # fmt: skip
    if spec.norm == "none":
        return out_NCYX, Saved(index_NCYX=index_NCYX) if spec.pool else Saved(out_NCHW=out_NCYX)
    return out_NCYX, Saved(x_NCHW, None, index_NCYX, peaks_NCYX, mean_C, rstd_C)
