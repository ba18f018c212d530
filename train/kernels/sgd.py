"""One pass of SGD over a parameter, which also writes the weight in the type that the next pass reads.

The float32 weight and velocity are updated in place, and the weight is rounded to the autocast type beside
it, so that no other pass casts it. What changes from step to step is read from tensors on the device; where
the step is skipped nothing is written.

`update_parameter` is plain torch, for any device and the reference, or the kernel of
`train.kernels.sgd_triton`, which reads and writes each value once: of a parameter 16 bytes of weight and
velocity, 4 of gradient, 2 of the copy.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from train.kernels.implementation import Implementation


@dataclass(frozen=True)
class SgdForm:
    """What of SGD is the same in every step; see `train.optim.sgd.ScaledSgd` for the formulas.

    Attributes:
        momentum: share of the velocity that a step keeps; 0 needs no velocity.
        weight_decay: share of the weight that is added to the gradient.
        nesterov: whether the update looks one step ahead.
        lr_in_velocity: whether the learning rate enters the velocity, as in the paper, or what it is applied
            to, as in torch.
    """

    momentum: float
    weight_decay: float = 0.0
    nesterov: bool = False
    lr_in_velocity: bool = False


@torch.no_grad()
def update_parameter(
    weight: Tensor,
    velocity: Tensor | None,
    gradient: Tensor,
    rate: Tensor,
    skip: Tensor,
    form: SgdForm,
    *,
    ratio: Tensor | None = None,
    half: Tensor | None = None,
    implementation: Implementation = "plain",
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
        implementation: `triton` takes one pass over memory, and a GPU.
    """
    assert (velocity is None) == (form.momentum == 0)
    assert weight.is_contiguous() or weight.is_contiguous(memory_format=torch.channels_last)
    layouts = {(t.shape, t.stride()) for t in (weight, velocity, gradient, half) if t is not None}
    assert len(layouts) == 1, "autograd gives a parameter's own layout"
    if implementation == "triton":
        from train.kernels.sgd_triton import launch_update

        launch_update(weight, velocity, gradient, rate, skip, form, ratio=ratio, half=half)
        return
    keep = skip == 0
    change = gradient
    if form.weight_decay:
        change = change + form.weight_decay * weight
    if ratio is not None:
        change = change * ratio
    if form.lr_in_velocity:
        change = change * rate
    if velocity is not None:
        new_velocity = form.momentum * velocity + change
        change = change + form.momentum * new_velocity if form.nesterov else new_velocity
        velocity.copy_(torch.where(keep, new_velocity, velocity))
    if not form.lr_in_velocity:
        change = rate * change
    weight.copy_(torch.where(keep, weight - change, weight))
    if half is not None:
        half.copy_(weight)
