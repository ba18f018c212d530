"""One pass of SGD over a parameter, which also writes the weight in the type that the next pass reads.

The float32 weight and velocity are updated in place, and the weight is rounded to the autocast type beside
it, so that no other pass casts it. What changes from step to step is read from tensors on the device; where
the step is skipped nothing is written. Each value is read and written once: of a parameter 16 bytes of weight
and velocity, 4 of gradient, 2 of the copy.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from train.kernels.interface import SgdForm

BLOCK = 1024
"""Values that a program updates."""
OPTIONS: dict[str, Any] = {"num_warps": 4, "enable_fp_fusion": False}
"""Of a launch. A product and a sum are each rounded, as by torch, which it equals to the bit so."""


@triton.jit
def sgd_kernel(
    weight_ptr,
    velocity_ptr,
    gradient_ptr,
    half_ptr,
    rate_ptr,
    ratio_ptr,
    skip_ptr,
    size,
    momentum,
    weight_decay,
    NESTEROV: tl.constexpr,
    LR_IN_VELOCITY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Update BLOCK values; in a skipped step none is read or written."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    go = place < tl.where(tl.load(skip_ptr) == 0, size, 0)
    rate = tl.load(rate_ptr)
    weight = tl.load(weight_ptr + place, mask=go, other=0.0)
    change = tl.load(gradient_ptr + place, mask=go, other=0.0) + weight_decay * weight
    if ratio_ptr is not None:
        change = change * tl.load(ratio_ptr)
    if LR_IN_VELOCITY:
        change = change * rate
    if velocity_ptr is not None:
        velocity = momentum * tl.load(velocity_ptr + place, mask=go, other=0.0) + change
        tl.store(velocity_ptr + place, velocity, mask=go)
        change = change + momentum * velocity if NESTEROV else velocity
    if not LR_IN_VELOCITY:
        change = rate * change
    weight = weight - change
    tl.store(weight_ptr + place, weight, mask=go)
    if half_ptr is not None:
        tl.store(half_ptr + place, weight.to(half_ptr.dtype.element_ty), mask=go)


def update_parameter(
    weight: Tensor,
    velocity: Tensor | None,
    gradient: Tensor,
    rate: Tensor,
    skip: Tensor,
    form: SgdForm,
    ratio: Tensor | None = None,
    half: Tensor | None = None,
) -> None:
    """Update a weight and its velocity in place, and the weight's copy in another type.

    Args:
        weight: float32, contiguous or channels_last, as the other tensors are, too.
        velocity: float32; None where the momentum is 0.
        gradient: float32.
        rate: () float32, the learning rate.
        skip: () float32, 1 where nothing may change, whatever the gradient is.
        ratio: () float32, by which gradient and decay are multiplied: LARS's.
        half: the weight's copy.
    """
    assert (velocity is None) == (form.momentum == 0)
    assert weight.is_contiguous() or weight.is_contiguous(memory_format=torch.channels_last)
    layouts = {(t.shape, t.stride()) for t in (weight, velocity, gradient, half) if t is not None}
    assert len(layouts) == 1, "autograd gives a parameter's own layout"
    assert weight.numel() < 2**31 - BLOCK and weight.dtype == torch.float32
    sgd_kernel[(-(-weight.numel() // BLOCK),)](
        weight,
        velocity,
        gradient,
        half,
        rate,
        ratio,
        skip,
        weight.numel(),
        form.momentum,
        form.weight_decay,
        NESTEROV=form.nesterov,
        LR_IN_VELOCITY=form.lr_in_velocity,
        BLOCK=BLOCK,
        **OPTIONS,
    )
    # autograd does not see what a kernel writes, and `train.optim.half_weights` asks it what is stale
    for written in (weight, velocity, half):
        if written is not None:
            torch.autograd.graph.increment_version(written)
