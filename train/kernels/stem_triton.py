"""From uint8 images to the inputs of the regrouped first convolution, by one kernel.

In one pass: each pixel is read once (a mixed one twice), each block written once, in the type that the
convolution reads. For 1,024 crops of 224 pixels in bfloat16 that is 154 MB read and 319 MB written.

Legend: N samples; H and W rows and columns of images; B blocks along a side; D channels of a block; I = 3.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from train.inputs.mixup import MixInputs
from train.kernels.stem import BlockShape

BLOCK = 1024
"""Values that a program writes."""
OPTIONS: dict[str, Any] = {"num_warps": 8, "enable_fp_fusion": False}
"""Of a launch. Four values a thread, which keeps 64 registers enough; a product and a sum are each
rounded, as torch's kernels round them."""


@triton.jit
def _inside(boxes_ptr, sample, y, x):
    """Whether pixels are inside of a sample's box."""
    box = boxes_ptr + sample * 4
    rows = (y >= tl.load(box)) & (y < tl.load(box + 2))
    columns = (x >= tl.load(box + 1)) & (x < tl.load(box + 3))
    return rows & columns


@triton.jit
def _normalized(images_ptr, erase_ptr, scales, shifts, sample, y, x, offsets, is_read, IMAGE: tl.constexpr):
    """A sample's pixels, normalised and erased, where `is_read`."""
    pixels = tl.load(images_ptr + sample.to(tl.int64) * IMAGE + offsets, mask=is_read, other=0)
    values = pixels.to(tl.float32) * scales + shifts
    if erase_ptr is not None:
        values = tl.where(_inside(erase_ptr, sample, y, x), 0.0, values)
    return values


@triton.jit
def _of_color(values_ptr, color):
    """One of three numbers, by colour; a choice among registers, where a load would be one for each value."""
    second_or_third = tl.where(color == 1, tl.load(values_ptr + 1), tl.load(values_ptr + 2))
    return tl.where(color == 0, tl.load(values_ptr), second_or_third)


@triton.jit
def input_kernel(
    images_ptr,
    scale_ptr,
    shift_ptr,
    erase_ptr,
    partners_ptr,
    weights_ptr,
    boxes_ptr,
    out_ptr,
    SIDE: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    BLOCKS: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write BLOCK values of a sample: uint8 (N, SIDE, SIDE, 3) -> (N, BLOCKS, BLOCKS, CHANNELS)."""
    VALUES: tl.constexpr = BLOCKS * BLOCKS * CHANNELS
    ROW: tl.constexpr = STRIDE * 3  # values of a row of a block, a run both in the image and in the block
    programs: tl.constexpr = (VALUES + BLOCK - 1) // BLOCK
    sample = tl.program_id(0) // programs
    place = (tl.program_id(0) % programs) * BLOCK + tl.arange(0, BLOCK)
    cell, channel = place // CHANNELS, place % CHANNELS
    color = channel % 3
    y = (cell // BLOCKS) * STRIDE + channel // ROW - PADDING
    x = (cell % BLOCKS) * STRIDE + (channel % ROW) // 3 - PADDING
    is_pixel = (y >= 0) & (y < SIDE) & (x >= 0) & (x < SIDE) & (channel < STRIDE * ROW)
    offsets = (y * SIDE + x) * 3 + color
    scales, shifts = _of_color(scale_ptr, color), _of_color(shift_ptr, color)
    values = _normalized(
        images_ptr, erase_ptr, scales, shifts, sample, y, x, offsets, is_pixel, SIDE * SIDE * 3
    )
    if partners_ptr is not None:
        share = tl.where(_inside(boxes_ptr, sample, y, x), 0.0, tl.load(weights_ptr + sample))
        partner = tl.load(partners_ptr + sample)
        is_mixed = is_pixel & (share != 1)
        others = _normalized(
            images_ptr, erase_ptr, scales, shifts, partner, y, x, offsets, is_mixed, SIDE * SIDE * 3
        )
        # torch.lerp's two forms: exact at both ends
        near_other = others + share * (values - others)
        near_own = values - (values - others) * (1 - share)
        values = tl.where(share < 0.5, near_other, near_own)
    values = tl.where(is_pixel, values, 0.0)
    target = out_ptr + sample.to(tl.int64) * VALUES + place
    tl.store(target, values.to(out_ptr.dtype.element_ty), mask=place < VALUES)


def s2d_inputs(
    images_NHWC: Tensor,
    scale_I: Tensor,
    shift_I: Tensor,
    shape: BlockShape,
    dtype: torch.dtype,
    erase_N4: Tensor | None = None,
    mix: MixInputs | None = None,
) -> Tensor:
    """Normalise, erase, mix, pad and regroup images, in this order, in float32, and round once to `dtype`.

    Without mixing the result is that of torch's operators to the bit. Mixed values are within a unit in the
    last place of float32 of the larger of the two that are mixed: torch's own lerp differs by that between
    its loops.

    Args:
        images_NHWC: uint8, (N, crop_px, crop_px, 3), contiguous.
        scale_I, shift_I: float32, of `train.models.alexnet.Normalize`: pixel * scale + shift.
        dtype: float32, or the autocast type.
        erase_N4: int64, top, left, bottom, right of a box of zeros in each image before it is mixed.
        mix: None where nothing is mixed.
    Returns:
        (N, D, B, B), channels_last.
    """
    side, count = shape.crop_px, len(images_NHWC)
    assert images_NHWC.shape[1:] == (side, side, 3) and images_NHWC.is_contiguous()
    blocks, channels = shape.blocks, shape.channels
    out_NBBD = torch.empty((count, blocks, blocks, channels), dtype=dtype, device=images_NHWC.device)
    plan = (None, None, None) if mix is None else (mix.partners, mix.weights, mix.boxes)
    assert all(tensor.is_contiguous() for tensor in (erase_N4, *plan) if tensor is not None)
    input_kernel[(count * -(-blocks * blocks * channels // BLOCK),)](
        images_NHWC,
        scale_I,
        shift_I,
        erase_N4,
        *plan,
        out_NBBD,
        **constants_of(shape),
        **OPTIONS,
    )
    return out_NBBD.permute(0, 3, 1, 2)


def constants_of(shape: BlockShape) -> dict[str, Any]:
    """Return what a shape makes constant in the kernel."""
    return {
        "SIDE": shape.crop_px,
        "STRIDE": shape.stride,
        "PADDING": shape.padding,
        "BLOCKS": shape.blocks,
        "CHANNELS": shape.channels,
        "BLOCK": BLOCK,
    }
