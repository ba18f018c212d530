"""Batch normalisation that can be part of the layer behind it, folded into that layer for the export.

What stands in front of the ReLU, ONNX's exporter and the runtimes fold into the layer before it. Behind the
ReLU, the scale and shift of a hidden layer's norm go into the weights of the next layer, to the same numbers.
Those of a convolution stay operators of their own: the next convolution pads with zeros behind the norm, so
that its border would change, and a pooling of a negative scale is none of maxima.
"""

from __future__ import annotations

import torch
from torch import nn

from train.models.alexnet import AlexNet
from train.models.batch_norm import BatchNorm

# Shapes: O outputs and I inputs of a layer.


@torch.no_grad()
def fold_hidden_norms(network: AlexNet, keep: int | None = None) -> None:
    """Fold each norm that the next fully connected layer reads into that layer, in place.

    Args:
        network: in evaluation mode, where dropout does nothing, with weights in float32.
        keep: number of modules of the classifier whose output is read as features: a norm that ends it stays.
    """
    waiting: tuple[str, BatchNorm] | None = None
    for number, (name, layer) in enumerate(list(network.classifier.named_children()), 1):
        if isinstance(layer, BatchNorm):
            waiting = None if number == keep else (name, layer)
        elif isinstance(layer, nn.Linear) and waiting is not None:
            place, norm = waiting
            assert norm.running_mean is not None and norm.running_var is not None
            scale_I = norm.weight.double() * (norm.running_var.double() + norm.eps).rsqrt()
            shift_I = norm.bias.double() - norm.running_mean.double() * scale_I
            weight_OI = layer.weight.double()
            layer.bias = nn.Parameter((layer.bias.double() + weight_OI @ shift_I).float())
            layer.weight = nn.Parameter((weight_OI * scale_I).float())
            setattr(network.classifier, place, nn.Identity())
            waiting = None
        elif not isinstance(layer, nn.Dropout):
            waiting = None
