"""Initial weights; the choice decides whether AlexNet leaves its plateau at ln(classes) at all."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from train.config.schema import Init


class Uninitialized(TorchFunctionMode):
    """A context in which new layers have weights of any value, for networks whose weights are loaded next.

    To draw 61 million weights twice, as torch does and then `initialize`, takes a second; this 0.01 s.
    Biases and weights of norms are any value as well, running statistics and other buffers are torch's.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call the function, unless it draws."""
        kwargs = kwargs or {}
        if func is torch.Tensor.normal_ or getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs.get("tensor", *args[:1])
        return func(*args, **kwargs)


def initialize(model: nn.Module, init: Init) -> None:
    """Set every weight and bias of an AlexNet in place.

    - `he`: normal with variance 2 / fan_in, biases 0. Leaves the plateau within an epoch or two.
    - `paper`: N(0, 0.01), biases 1 in the 2nd, 4th and 5th convolution and both hidden layers, else 0.
    - `caffe`: as `paper`, but 0.1 for those biases and standard deviation 0.005 in the two hidden layers.
    - `torch`: PyTorch's own, uniform with a sixth of He's variance, as torchvision trained its `alexnet`. The
      loss can sit at ln(classes) for epochs.

    Args:
        model: convolutions and linear layers in the order in which they are applied.
        init: which of the four.
    Source: He et al. 2015, section 2.2; Krizhevsky et al. 2012, section 5; BVLC `bvlc_alexnet`; torch.nn.
    """
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    positive_bias = {id(m) for m in (*convolutions[1:2], *convolutions[3:5], *linears[:2])}
    hidden = {id(m) for m in linears[:2]}
    layers: list[nn.Conv2d | nn.Linear] = [*convolutions, *linears]
    for layer in layers:
        if init == "torch":
            layer.reset_parameters()
            continue
        if init == "he":
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        else:
            std = 0.005 if init == "caffe" and id(layer) in hidden else 0.01
            nn.init.normal_(layer.weight, std=std)
        if layer.bias is not None:
            positive = {"he": 0.0, "paper": 1.0, "caffe": 0.1}[init]
            nn.init.constant_(layer.bias, positive if id(layer) in positive_bias else 0.0)
