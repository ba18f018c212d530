"""An AlexNet in training, run by fused blocks: its own modules and parameters, in fewer passes over memory.

Convolutions run without their bias, and what stands between them is one block (`train.kernels.fused_block`).
Nothing is copied: the network's parameters get the gradients, its running statistics are updated, and its
state, checkpoints and evaluation are what they were. What has no block runs as the module that it is, and
`Stage.why_not_fused` says so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, linear

from train.kernels.block import BlockSpec
from train.kernels.fused_block import fused_block
from train.kernels.interface import Kernels
from train.models.alexnet import AlexNet
from train.models.batch_norm import BatchNorm
from train.models.lrn import LocalResponseNorm

# Shapes: N samples, C channels or classes, H and W rows and columns, D features.

WeightOf = Callable[[Tensor], Tensor]
"""Gives the tensor that a pass reads for a parameter: itself, or its copy in the autocast type."""


@dataclass(frozen=True)
class Stage:
    """A convolution and what follows it, up to the next.

    Attributes:
        name: of the convolution in the network.
        rest: its norm, ReLU and pooling, in their order.
        spec: the block that stands for them; None where there is none.
        norm: the batch normalisation among them.
    """

    name: str
    conv: nn.Conv2d
    rest: tuple[nn.Module, ...]
    spec: BlockSpec | None
    norm: BatchNorm | None

    def why_not_fused(self) -> str | None:
        """Say why the modules run in place of a block; None where the block does."""
        if self.spec is None:
            return "no block stands for " + ", ".join(type(module).__name__ for module in self.rest)
        if self.norm is None:
            return None
        if self.norm.ghost_batch is not None:
            return "ghost batches have statistics of their own"
        if self.norm.ranks is not None:
            return "its statistics are over all ranks"
        return None if self.norm.training else "its batch normalisation is frozen"


def stages_of(features: nn.Sequential) -> list[Stage]:
    """Divide convolutional features into stages, each with one convolution at its beginning."""
    parts: list[tuple[str, nn.Conv2d, list[nn.Module]]] = []
    for name, module in features.named_children():
        if isinstance(module, nn.Conv2d):
            parts.append((f"features.{name}", module, []))
        else:
            parts[-1][2].append(module)
    stages = []
    for name, conv, rest in parts:
        norm = next((module for module in rest if isinstance(module, BatchNorm)), None)
        stages.append(Stage(name, conv, tuple(rest), spec_of(rest), norm))
    return stages


def spec_of(rest: list[nn.Module]) -> BlockSpec | None:
    """Return the block that computes what modules do one after another in training; None if none does.

    >>> spec_of([nn.ReLU(), nn.MaxPool2d(3, 2)]).pool, spec_of([nn.MaxPool2d(2, 2)])
    (True, None)
    """
    rest, pooling = list(rest), BlockSpec()
    if rest and isinstance(pool := rest[-1], nn.MaxPool2d):
        rest.pop()
        if (pool.kernel_size, pool.stride, pool.dilation) != (3, 2, 1) or pool.padding not in (0, 1):
            return None
        pooling = BlockSpec(pool=True, pool_padding=int(pool.padding), pool_ceil=pool.ceil_mode)
    match rest:
        case [nn.ReLU()]:
            return pooling
        case [nn.ReLU(), LocalResponseNorm() as lrn]:
            return replace(
                pooling,
                norm="lrn",
                lrn_size=lrn.size,
                lrn_alpha=lrn.alpha,
                lrn_beta=lrn.beta,
                lrn_k=lrn.k,
            )
        case [BatchNorm(), nn.ReLU()]:
            return replace(pooling, norm="bn")
        case [nn.ReLU(), BatchNorm()]:
            return replace(pooling, norm="bn_after_relu")
    return None


class FusedNetwork:
    """The forward pass of an AlexNet in training mode, with its backward pass by autograd.

    The caller chooses the types, as for the network itself: under autocast the convolutions and matrix
    products are in its type, and so are the maps between them; the blocks add up in float32.

    Args:
        network: stays what it is; layers that are replaced later are not seen.
        kernels: of the blocks.
        weight_of: what is read for a weight or bias of a convolution or linear layer; None for itself.
    Shape:
        normalised float images (N, 3, crop_px, crop_px) -> logits (N, num_classes).
    """

    def __init__(self, network: AlexNet, kernels: Kernels, weight_of: WeightOf | None = None) -> None:
        self.network, self.kernels = network, kernels
        self.weight_of: WeightOf = weight_of or (lambda parameter: parameter)
        self.stages = stages_of(network.features)

    def __call__(self, images_NCHW: Tensor) -> Tensor:
        """Compute the logits of normalised images."""
        return self.forward_from(self.convolve(self.stages[0], images_NCHW))

    def forward_from(self, map_NCHW: Tensor) -> Tensor:
        """Compute the logits from what the first convolution gives, without its bias."""
        assert self.network.training
        for number, stage in enumerate(self.stages):
            if number:
                map_NCHW = self.convolve(stage, map_NCHW)
            map_NCHW = self.finish(stage, map_NCHW)
        return self.classify(map_NCHW)

    def convolve(self, stage: Stage, map_NCHW: Tensor) -> Tensor:
        """Convolve a map, without the bias."""
        conv = stage.conv
        return conv2d(
            map_NCHW, self.weight_of(conv.weight), None, conv.stride, conv.padding, conv.dilation, conv.groups
        )

    def finish(self, stage: Stage, map_NCHW: Tensor) -> Tensor:
        """Apply bias, norm, ReLU and pooling, by a block or by the modules."""
        bias_C = stage.conv.bias
        if stage.why_not_fused() is None:
            assert stage.spec is not None
            return fused_block(map_NCHW, stage.spec, bias_C, stage.norm, self.kernels)
        if bias_C is not None:
            map_NCHW = map_NCHW + self.weight_of(bias_C).to(map_NCHW.dtype)[:, None, None]
        for module in stage.rest:
            map_NCHW = module(map_NCHW)
        return map_NCHW

    def classify(self, map_NCHW: Tensor) -> Tensor:
        """Compute the logits from the last map."""
        pool = self.network.avgpool
        # a map that has the size already is its own average; the pooling would read and write it
        if not (isinstance(pool, nn.AdaptiveAvgPool2d) and pool.output_size == tuple(map_NCHW.shape[2:])):
            map_NCHW = pool(map_NCHW)
        hidden_ND = torch.flatten(map_NCHW, 1)
        for module in self.network.classifier.children():
            if type(module) is nn.Linear:  # one that is divided over ranks has another type
                bias_D: Tensor | None = module.bias  # a norm that follows has its own
                if bias_D is not None:
                    bias_D = self.weight_of(bias_D)
                hidden_ND = linear(hidden_ND, self.weight_of(module.weight), bias_D)
            else:
                hidden_ND = module(hidden_ND)
        return hidden_ND
