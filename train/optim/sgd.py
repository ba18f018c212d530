"""The optimiser: fused SGD with momentum, with gradients scaled first for LARS and the paper's velocity."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from data_pipeline.common.errors import UserError
from train.config.schema import OptimizerConfig

LR_FACTOR = "lr_factor"
"""Key of a parameter group: factor of the schedule's learning rate."""


def make_optimizer(
    model: nn.Module, config: OptimizerConfig, head: nn.Module | None = None, head_rate: float = 1.0
) -> torch.optim.SGD:
    """Build SGD or LARS over what trains of a model; `set_lr` sets the learning rate before each step.

    Biases and norms (every parameter of fewer than two dimensions) do not decay unless configured to, can
    have a learning rate of their own, and are plain SGD under LARS. The update is fused into one pass over
    the parameters.

    Args:
        model: frozen parameters, which need no gradient, are left out.
        head: the layer that gives the logits.
        head_rate: its learning rate, as a multiple of what it would be by itself.
    Source: Krizhevsky et al. 2012, section 5; He et al. 2019, section 3.1 (no decay of biases and norms).
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    one_group = config.decay_bias_and_norm and config.bias_and_norm_rate == 1 and config.name == "sgd"
    no_decay = [] if one_group else [p for p in parameters if p.ndim < 2]
    decay = [p for p in parameters if one_group or p.ndim >= 2]
    trust = config.trust_coefficient if config.name == "lars" else 0.0
    groups: list[dict[str, Any]] = [
        {"params": decay, LR_FACTOR: 1.0, "trust_coefficient": trust},
        {
            "params": no_decay,
            LR_FACTOR: config.bias_and_norm_rate,
            "trust_coefficient": 0.0,
            "weight_decay": config.weight_decay if config.decay_bias_and_norm else 0.0,
        },
    ]
    if head is not None and head_rate != 1:
        groups = [half for group in groups for half in _split_head(group, head, head_rate)]
    lr_in_velocity = config.momentum_form == "paper"
    scaled = config.name == "lars" or lr_in_velocity
    optimizer = (ScaledSgd if scaled else torch.optim.SGD)(
        [group for group in groups if group["params"]],
        lr=0.0,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        nesterov=config.nesterov,
        fused=True,
    )
    for group in optimizer.param_groups:
        group["lr_in_velocity"] = lr_in_velocity
    return optimizer


def _split_head(group: dict[str, Any], head: nn.Module, rate: float) -> list[dict[str, Any]]:
    """Split a parameter group into the body's, and the head's with a learning rate of its own."""
    in_head = set(map(id, head.parameters()))
    return [
        {**group, "params": [p for p in group["params"] if id(p) not in in_head]},
        {
            **group,
            "params": [p for p in group["params"] if id(p) in in_head],
            LR_FACTOR: group[LR_FACTOR] * rate,
        },
    ]


class ScaledSgd(torch.optim.SGD):
    """Fused SGD whose gradients are scaled first, on the device: by LARS, by the learning rate, or by both.

    With v the velocity, g the gradient, w the weights, and m, d and r momentum, decay and learning rate:

        torch's form            v = m v + (g + d w)        w = w - r v
        the paper's             v = m v + r (g + d w)      w = w - v
        LARS, either form       (g + d w) times  trust |w| / (|g| + d |w|)

    At a constant rate the first two are the same. In a skipped step (`found_inf`) only the gradients change,
    which are not used again. A rate can be a tensor on the device (see `update`): nothing is computed from it
    on the host.

    Source: Krizhevsky et al. 2012, section 5; You et al. 2017, algorithm 1, which has the paper's form.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update once; nothing waits for the device."""
        configured = [(group["lr"], group["weight_decay"]) for group in self.param_groups]
        try:
            for group in self.param_groups:
                _scale_gradients(group)
            loss: float | None = super().step(closure)
            return loss
        finally:
            for group, (lr, weight_decay) in zip(self.param_groups, configured, strict=True):
                group["lr"], group["weight_decay"] = lr, weight_decay


def _scale_gradients(group: dict[str, Any]) -> None:
    """Scale a group's gradients, and set the learning rate and decay of the fused update to match."""
    parameters = [p for p in group["params"] if p.grad is not None]
    gradients = [p.grad for p in parameters]
    if not parameters:
        return
    decay, factor = group["weight_decay"], group["lr"] if group["lr_in_velocity"] else 1.0
    ratios_L = None
    if group["trust_coefficient"]:
        ratios_L = trust_ratios(parameters, gradients, group["trust_coefficient"], decay)
    if (ratios_L is not None or group["lr_in_velocity"]) and decay:
        torch._foreach_add_(gradients, parameters, alpha=decay)
        group["weight_decay"] = 0.0
    if ratios_L is not None:
        torch._foreach_mul_(gradients, list((ratios_L * factor).unbind()))
    elif group["lr_in_velocity"]:
        torch._foreach_mul_(gradients, factor)
    if group["lr_in_velocity"]:
        group["lr"] = 1.0


def trust_ratios(weights: list[Tensor], gradients: list[Tensor], trust: float, weight_decay: float) -> Tensor:
    """Return LARS's ratio of each layer, 1 if its weights or its gradient are all 0.

    Returns:
        (L) float32, for L layers.
    """
    weight_L = torch.stack(torch._foreach_norm(weights))
    gradient_L = torch.stack(torch._foreach_norm(gradients, 2, torch.float32))  # of half gradients, too
    ratios_L = trust * weight_L / (gradient_L + weight_decay * weight_L)
    return torch.where((weight_L > 0) & (gradient_L > 0), ratios_L, 1.0)


def set_lr(optimizer: torch.optim.Optimizer, learning_rate: float) -> list[float]:
    """Set the learning rate of the schedule, times each group's own factor, and return those of the groups.

    These are on the host, for rows and checkpoints; `update` takes them as tensors.
    """
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group[LR_FACTOR]
    return [group["lr"] for group in optimizer.param_groups]


Apply = Callable[[torch.optim.SGD, Tensor], None]
"""Changes weights and velocities by their gradients, or nothing where the tensor, () float32, is 1."""


def apply_fused(optimizer: torch.optim.SGD, skip: Tensor) -> None:
    """Apply one step of torch's fused optimiser.

    Source: the attributes by which torch.amp.GradScaler makes fused optimisers skip a step.
    """
    optimizer.found_inf, optimizer.grad_scale = skip, None  # type: ignore[attr-defined]
    try:
        optimizer.step()
    finally:
        del optimizer.found_inf, optimizer.grad_scale  # type: ignore[attr-defined]


def update(
    optimizer: torch.optim.SGD, skip: Tensor, rates: Sequence[Tensor], apply: Apply = apply_fused
) -> None:
    """Update once, or not at all if `skip` is 1. Nothing waits for a GPU.

    Args:
        skip: () float32, which only the device knows.
        rates: () float32, the learning rate of each parameter group, on the device: while `apply` runs, these
            are the groups' own.
    """
    on_host = [group["lr"] for group in optimizer.param_groups]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    try:
        apply(optimizer, skip)
    finally:
        for group, rate_on_host in zip(optimizer.param_groups, on_host, strict=True):
            group["lr"] = rate_on_host


def load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Restore velocities and the current learning rate; all else stays as configured.

    Raises:
        UserError: a state for other parameters.
    """
    own, saved = optimizer.state_dict()["param_groups"], state["param_groups"]
    if [group["params"] for group in own] != [group["params"] for group in saved]:
        raise UserError("the checkpoint's velocities are of other parameters: it was made by another recipe")
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for number, values in state["state"].items():
        for name, value in values.items():
            if value is not None and (number >= len(parameters) or value.shape != parameters[number].shape):
                raise UserError(f"the checkpoint's {name} {number} is of another shape than its parameter")
    groups = [{**group, "lr": before["lr"]} for group, before in zip(own, saved, strict=True)]
    optimizer.load_state_dict({"state": state["state"], "param_groups": groups})


def start_momentum(optimizer: torch.optim.SGD) -> None:
    """Give every parameter a momentum buffer of zeros if it has none, which is what it starts from anyway.

    The fused update leaves the new buffer uninitialised if the very first step is skipped.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"] if group["momentum"] else ():
            state = optimizer.state[parameter]
            if state.get("momentum_buffer") is None:
                state["momentum_buffer"] = torch.zeros_like(parameter)
