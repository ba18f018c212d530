"""The optimiser: SGD with momentum in one fused pass, and what LARS and the paper's velocity do before it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from data_pipeline.common.errors import UserError
from train.config.schema import OptimizerConfig

RATE_FACTOR = "rate_factor"
"""Key of a parameter group: what the rate of the schedule is multiplied by in it."""


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.SGD:
    """SGD or LARS over all parameters of a model; `set_rate` sets the learning rate before each step.

    Biases and norms (every parameter of fewer than two dimensions) do not decay unless the configuration
    says so, can have a rate of their own, and are plain SGD under LARS. The update is fused into one pass
    over the parameters.

    Source: Krizhevsky et al. 2012, section 5; He et al. 2019, section 3.1 (no decay of biases and norms).
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    alike = config.decay_bias_and_norm and config.bias_and_norm_rate == 1 and config.name == "sgd"
    spared = [] if alike else [p for p in parameters if p.ndim < 2]
    others = [p for p in parameters if not any(p is s for s in spared)]
    trust = config.trust_coefficient if config.name == "lars" else 0.0
    groups: list[dict[str, Any]] = [
        {"params": others, RATE_FACTOR: 1.0, "trust_coefficient": trust},
        {
            "params": spared,
            RATE_FACTOR: config.bias_and_norm_rate,
            "trust_coefficient": 0.0,
            "weight_decay": config.weight_decay if config.decay_bias_and_norm else 0.0,
        },
    ]
    plain = config.name == "sgd" and config.momentum_form == "torch"
    optimizer = (torch.optim.SGD if plain else ScaledSgd)(
        [group for group in groups if group["params"]],
        lr=0.0,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        nesterov=config.nesterov,
        fused=True,
    )
    for group in optimizer.param_groups:
        group["rate_inside"] = config.momentum_form == "paper"
    return optimizer


class ScaledSgd(torch.optim.SGD):
    """Fused SGD whose gradients are scaled first, on the device: by LARS, by the rate, or by both.

    With v the velocity, g the gradient, w the weights, and m, d and r momentum, decay and rate:

        torch's form            v = m v + (g + d w)        w = w - r v
        the paper's             v = m v + r (g + d w)      w = w - v
        LARS, either form       (g + d w) times  trust |w| / (|g| + d |w|)

    At a constant rate the first two are the same. Where a step is to be skipped (`found_inf`), only the
    gradients have changed, which are dropped.

    Source: Krizhevsky et al. 2012, section 5; You et al. 2017, algorithm 1, which has the paper's form.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update; nothing waits for the device."""
        kept = [(group["lr"], group["weight_decay"]) for group in self.param_groups]
        try:
            for group in self.param_groups:
                _scale_gradients(group)
            loss: float | None = super().step(closure)
            return loss
        finally:
            for group, (lr, weight_decay) in zip(self.param_groups, kept, strict=True):
                group["lr"], group["weight_decay"] = lr, weight_decay


def _scale_gradients(group: dict[str, Any]) -> None:
    """Scale a group's gradients, and set the rate and the decay with which they are to be applied."""
    parameters = [p for p in group["params"] if p.grad is not None]
    gradients = [p.grad for p in parameters]
    if not parameters:
        return
    inside = group["lr"] if group["rate_inside"] else 1.0
    if group["trust_coefficient"]:
        decay = group["weight_decay"]
        ratios = trust_ratios(parameters, gradients, group["trust_coefficient"], decay)
        if decay:
            torch._foreach_add_(gradients, parameters, alpha=decay)
        torch._foreach_mul_(gradients, list((ratios * inside).unbind()))
        group["weight_decay"] = 0.0
    elif group["rate_inside"]:
        torch._foreach_mul_(gradients, inside)
        group["weight_decay"] *= inside
    if group["rate_inside"]:
        group["lr"] = 1.0


def trust_ratios(weights: list[Tensor], gradients: list[Tensor], trust: float, weight_decay: float) -> Tensor:
    """LARS's ratio of each layer, 1 where its weights or its gradient are all 0.

    Returns:
        (L) float32, for L layers.
    """
    weight_L = torch.stack(torch._foreach_norm(weights))
    gradient_L = torch.stack(torch._foreach_norm(gradients))
    ratios_L = trust * weight_L / (gradient_L + weight_decay * weight_L)
    return torch.where((weight_L > 0) & (gradient_L > 0), ratios_L, 1.0)


def set_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Set the rate of the schedule, times each group's own factor."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group[RATE_FACTOR]


def load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Take over velocities and the present rate; all else is the configuration's, which may be newer.

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
    """Give every parameter without a momentum one of zero, which is what it starts from in any case.

    The fused step would leave memory as it found it there, were the very first step skipped.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"] if group["momentum"] else ():
            state = optimizer.state[parameter]
            if state.get("momentum_buffer") is None:
                state["momentum_buffer"] = torch.zeros_like(parameter)
