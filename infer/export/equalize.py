"""Equalises the ranges of channels around a norm behind ReLU, so that int8 can keep its values.

There, channels differ by hundreds: a unit that is rarely active varies by a thousandth of another, its norm
multiplies it by hundreds, and when it is active, it is far beyond all others. One scale for all channels of a
tensor then keeps little but rounding of most of them. But ReLU and pooling commute with a factor above 0: a
channel can be divided by one in the layer in front, and multiplied by it in the weights of the layer behind.
The network stays the same function.

Source: Nagel et al. 2019, "Data-free quantization through weight equalization and bias correction", section
4.1; Xiao et al. 2023, "SmoothQuant", section 4 (the factor that shares the range between values and weights).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from train.models.alexnet import AlexNet, FeatureLayer
from train.models.batch_norm import BatchNorm

# Shapes: C channels or units that a norm gives; O outputs and G groups of the layer that reads them.

Layer = nn.Conv2d | nn.Linear
NORM_OF: dict[FeatureLayer, int] = {"pool5": 5, "fc6": 6, "fc7": 7}
"""The one of the seven layers' norms that gives a layer's features."""


@torch.no_grad()
def equalize_ranges(
    network: AlexNet,
    normalize: nn.Module,
    batches: Iterable[NDArray[np.uint8]],
    features: FeatureLayer | None = None,
) -> int:
    """Equalise the channels behind every norm that follows a ReLU, for evaluation.

    Args:
        network: changed in place; its norms are of no use for training afterwards.
        normalize: takes decoded images to the network's input.
        batches: decoded images (n, crop, crop, 3), whose values tell the ranges.
        features: a layer whose features are an output, too: those keep their values.
    Returns:
        How many norms there were.
    """
    places = list(_places(network))
    if not places:
        return 0
    network.eval()
    largest = {norm: torch.zeros(norm.num_features, dtype=torch.float64) for _, norm, _ in places}

    def keep_largest(norm: BatchNorm, inputs: object, output: Tensor) -> None:
        largest[norm] = torch.maximum(largest[norm], output.transpose(0, 1).flatten(1).abs().amax(1))

    hooks = [norm.register_forward_hook(keep_largest) for norm in largest]
    for images_NHWC in batches:
        network(normalize(torch.from_numpy(images_NHWC)))
    for hook in hooks:
        hook.remove()
    kept = None if features is None else NORM_OF[features]
    for number, (before, norm, behind) in enumerate(places, 1):
        # (O, C, ...), or of a group's channels (G, O / G, C / G, ...)
        groups = behind.groups if isinstance(behind, nn.Conv2d) else 1
        shape = (groups, len(behind.weight) // groups, norm.num_features // groups, -1)
        weights = behind.weight.double().contiguous().view(shape)
        # What each channel is divided by, so that its values and the weights that read it have one range.
        values_C, weights_C = largest[norm], weights.abs().amax((1, 3)).flatten()
        alive_C = (values_C > 0) & (weights_C > 0) & (number != kept)
        share_C = torch.where(alive_C, (values_C / weights_C).sqrt(), 1.0)
        _divide(before, norm, share_C)
        behind.weight.copy_((weights * share_C.view(groups, 1, -1, 1)).view_as(behind.weight))
    return len(places)


def _places(network: AlexNet) -> Iterator[tuple[Layer, BatchNorm, Layer]]:
    """Each norm behind a ReLU, with the layer in front of that, and the layer that reads it."""
    modules = [*network.features.children(), *network.classifier.children()]
    for number, norm in enumerate(modules):
        if isinstance(norm, BatchNorm) and isinstance(modules[number - 1], nn.ReLU):
            layer, behind = modules[number - 2], modules[number + 1 :]
            assert isinstance(layer, Layer)
            yield layer, norm, next(module for module in behind if isinstance(module, Layer))


def _divide(before: Layer, norm: BatchNorm, share_C: Tensor) -> None:
    """Divide a norm's output, with its scale moved through the ReLU into the layer in front."""
    mean_C, variance_C = norm.running_mean, norm.running_var
    assert mean_C is not None and variance_C is not None and before.bias is not None
    scale_C = norm.weight.double() * (variance_C.double() + norm.eps).rsqrt()
    shift_C = norm.bias.double() - scale_C * mean_C.double()
    scale_C, shift_C = scale_C / share_C, shift_C / share_C
    # Only a factor above 0 passes the ReLU: a sign, or 0, stays with the norm.
    factor_C = torch.where(scale_C == 0, 1.0, scale_C.abs())
    before.weight.copy_(before.weight * factor_C.view(-1, *(1,) * (before.weight.ndim - 1)))
    before.bias.copy_(before.bias * factor_C)
    norm.weight.copy_(scale_C.sign())
    norm.bias.copy_(shift_C)
    mean_C.zero_()
    variance_C.fill_(1.0)
    norm.eps = 0.0
