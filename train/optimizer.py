"""The optimiser: SGD with momentum, and which parameters decay."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from train.config import OptimizerConfig


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.SGD:
    """SGD over all parameters of a model; the learning rate is set before each step (`train.schedule`).

    Biases and norms (every parameter of fewer than two dimensions) do not decay unless the configuration
    says so. The update is fused into one pass over the parameters.

    Source: Krizhevsky et al. 2012, section 5; He et al. 2019, section 3.1 (no decay of biases and norms).
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    spared = [] if config.decay_bias_and_norm else [p for p in parameters if p.ndim < 2]
    decayed = [p for p in parameters if not any(p is s for s in spared)]
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": spared, "weight_decay": 0.0}]
    return torch.optim.SGD(
        [group for group in groups if group["params"]],
        lr=0.0,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        nesterov=config.nesterov,
        fused=True,
    )


def start_momentum(optimizer: torch.optim.SGD) -> None:
    """Give every parameter without a momentum one of zero, which is what it starts from in any case.

    The fused step would leave memory as it found it there, were the very first step skipped.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"] if group["momentum"] else ():
            state = optimizer.state[parameter]
            if state.get("momentum_buffer") is None:
                state["momentum_buffer"] = torch.zeros_like(parameter)
