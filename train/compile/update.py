"""The optimiser's step by one pass for each parameter, which keeps the half weights up to date."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from train.kernels.implementation import Implementation
from train.kernels.sgd import SgdForm, update_parameter
from train.optim.half_weights import HalfWeights
from train.optim.sgd import trust_ratios


@torch.no_grad()
def update_weights(
    optimizer: torch.optim.SGD,
    skip: Tensor,
    halves: HalfWeights | None = None,
    *,
    implementation: Implementation = "plain",
) -> None:
    """Apply one step of `train.optim.sgd.make_optimizer`'s SGD, or none where `skip` is 1.

    In place of `optimizer.step()`, for SGD in torch's and in the paper's form and for LARS. Nothing waits for
    the device. Unlike torch's step it takes gradients in half types and leaves all gradients unchanged.

    Args:
        optimizer: with momentum buffers (`start_momentum`); a group's "lr" is a number or a () tensor on the
            device of its parameters. A graph needs the tensor.
        skip: () float32, which only the device knows.
        halves: whose copies are written along with their weights.
    """
    for group in optimizer.param_groups:
        parameters = [p for p in group["params"] if p.grad is not None]
        if parameters:
            _update_group(optimizer, group, parameters, skip, halves, implementation)


def _update_group(
    optimizer: torch.optim.SGD,
    group: dict[str, Any],
    parameters: list[Tensor],
    skip: Tensor,
    halves: HalfWeights | None,
    implementation: Implementation,
) -> None:
    assert not group["maximize"] and not group["dampening"]
    form = SgdForm(group["momentum"], group["weight_decay"], group["nesterov"], group["lr_in_velocity"])
    device, rate = parameters[0].device, group["lr"]
    if not isinstance(rate, Tensor):
        rate = torch.full((), rate, dtype=torch.float32, device=device)
    gradients = [p.grad for p in parameters if p.grad is not None]
    ratios: list[Tensor | None] = [None] * len(parameters)
    if group["trust_coefficient"]:
        ratios_L = trust_ratios(parameters, gradients, group["trust_coefficient"], group["weight_decay"])
        ratios = list(ratios_L.unbind())
    for parameter, gradient, ratio in zip(parameters, gradients, ratios, strict=True):
        velocity = optimizer.state[parameter]["momentum_buffer"] if form.momentum else None
        half = None if halves is None else halves.copy_of(parameter)
        update_parameter(
            parameter,
            velocity,
            gradient,
            rate,
            skip,
            form,
            ratio=ratio,
            half=half,
            implementation=implementation,
        )
        if halves is not None and half is not None:
            halves.mark_written(parameter)
