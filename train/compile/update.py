"""The optimiser's step by one pass for each parameter, which keeps the half weights up to date."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from train.kernels.interface import Kernels, SgdForm
from train.optim.half_weights import HalfWeights
from train.optim.sgd import trust_ratios


@torch.no_grad()
def update_weights(
    optimizer: torch.optim.SGD, skip: Tensor, halves: HalfWeights | None, kernels: Kernels
) -> None:
    """Apply one step of `train.optim.sgd.make_optimizer`'s SGD, or none where `skip` is 1.

    In place of `optimizer.step()`, for SGD in torch's and in the paper's form and for LARS. Nothing waits for
    the device. Unlike torch's step it leaves all gradients unchanged.

    Args:
        optimizer: with momentum buffers (`start_momentum`); a group's "lr" is a number or a () tensor on the
            device of its parameters. A graph needs the tensor.
        skip: () float32, which only the device knows.
        halves: whose copies are written along with their weights.
    """
    for group in optimizer.param_groups:
        assert not group["maximize"] and not group["dampening"]
        form = SgdForm(group["momentum"], group["weight_decay"], group["nesterov"], group["lr_in_velocity"])
        rate = torch.as_tensor(group["lr"], dtype=torch.float32, device=skip.device)
        parameters = [p for p in group["params"] if p.grad is not None]
        gradients = [p.grad for p in parameters]
        ratios: Sequence[Tensor | None] = [None] * len(parameters)
        if parameters and group["trust_coefficient"]:
            trust, decay = group["trust_coefficient"], form.weight_decay
            ratios = trust_ratios(parameters, gradients, trust, decay).unbind()
        for parameter, gradient, ratio in zip(parameters, gradients, ratios, strict=True):
            velocity = optimizer.state[parameter]["momentum_buffer"] if form.momentum else None
            half = halves.copy_of(parameter) if halves is not None else None
            kernels.update_parameter(parameter, velocity, gradient, rate, skip, form, ratio, half)
            if halves is not None:
                halves.mark_written(parameter)
