"""The signatures of the kernels of a fast step, whoever computes them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from train.inputs.mixup import MixInputs
from train.kernels.block import BlockSpec, Gradients, Saved
from train.kernels.stem import BlockShape


@dataclass(frozen=True)
class SgdForm:
    """Settings of SGD that are the same in every step; `train.optim.sgd.ScaledSgd` has the formulas.

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


@dataclass(frozen=True)
class Kernels:
    """One form of all kernels: Triton's, or another that it is compared with.

    Attributes:
        block_forward: see `train.kernels.block_forward_triton.forward`.
        block_backward: see `train.kernels.block_backward_triton.backward`.
        s2d_inputs: see `train.kernels.stem_triton.s2d_inputs`.
        update_parameter: see `train.kernels.sgd_triton.update_parameter`.
    """

    block_forward: Callable[[BlockSpec, Tensor, Tensor | None, _BatchNorm | None], tuple[Tensor, Saved]]
    block_backward: Callable[
        [BlockSpec, Saved, Tensor, Tensor | None, _BatchNorm | None, torch.Size], Gradients
    ]
    s2d_inputs: Callable[
        [Tensor, Tensor, Tensor, BlockShape, torch.dtype, Tensor | None, MixInputs | None], Tensor
    ]
    update_parameter: Callable[
        [Tensor, Tensor | None, Tensor, Tensor, Tensor, SgdForm, Tensor | None, Tensor | None], None
    ]


def triton_kernels() -> Kernels:
    """Import Triton's, which a machine without a GPU may not have."""
    from train.kernels import block_backward_triton, block_forward_triton, sgd_triton, stem_triton

    return Kernels(
        block_forward_triton.forward,
        block_backward_triton.backward,
        stem_triton.s2d_inputs,
        sgd_triton.update_parameter,
    )
