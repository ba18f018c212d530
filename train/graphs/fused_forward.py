"""The forward pass by fused kernels: from a micro-batch's uint8 images to its logits.

Images become the first convolution's inputs in one kernel, blocks run what stands between convolutions, and
weights are read in the autocast type. What has no kernel runs as its module, and `why_modules` says so.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import conv2d

from train.compile.fused import FusedNetwork, stages_of
from train.compile.update import update_weights
from train.graphs.capture import Capture
from train.graphs.fast_step import FastStep
from train.inputs.pass_inputs import PassInputs
from train.inputs.trivial import trivial_augment
from train.kernels.interface import Kernels
from train.kernels.stem import BlockShape, s2d_shape, s2d_weights, why_plain
from train.models.parts import set_training
from train.optim.half_weights import HalfWeights
from train.step import StepFn, StepParts, training_inputs

# Shapes: N samples of a micro-batch, H and W rows and columns, D channels of a block of pixels, C classes.

HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def make_fused_step(parts: StepParts, capture: Capture, kernels: Kernels) -> StepFn:
    """Build the fast step whose passes and update are fused kernels.

    Args:
        capture: how the work is done again and again.
    """
    half = HALVES.get(parts.precision.name)
    halves = HalfWeights(parts.network, half, parts.optimizer) if half is not None else None
    step = FastStep(
        parts,
        capture,
        forward=FusedForward(parts, halves, kernels),
        apply=partial(update_weights, halves=halves, kernels=kernels),
        before=halves.refresh if halves is not None else None,
    )
    if halves is not None:
        halves.share(step.leaves())
    return step


def why_modules(parts: StepParts) -> tuple[str, ...]:
    """Return a line for each part of a network that runs as the module that it is, with the reason."""
    set_training(parts.network, parts.config.freeze)
    stages = stages_of(parts.network.features)
    reasons = [(stages[0].name, why_plain(stages[0].conv))]
    reasons += [(stage.name, stage.why_not_fused()) for stage in stages]
    return tuple(f"{name}: {reason}" for name, reason in reasons if reason is not None)


class FusedForward:
    """Computes a micro-batch's logits in training.

    Args:
        halves: the weights in the autocast type; None in float32.
    """

    def __init__(self, parts: StepParts, halves: HalfWeights | None, kernels: Kernels) -> None:
        self._parts, self._kernels = parts, kernels
        weight_of = halves.half_of if halves is not None else None
        self._network = FusedNetwork(parts.network, kernels, weight_of)
        self._conv = conv = self._network.stages[0].conv
        self._shape: BlockShape | None = None
        if why_plain(conv) is None:
            sizes = (int(conv.kernel_size[0]), int(conv.stride[0]), int(conv.padding[0]))
            self._shape = s2d_shape(parts.config.preprocessing.crop_px, *sizes)

    def __call__(self, inputs: PassInputs) -> Tensor:
        """Return the logits, (N, C)."""
        if self._shape is None:
            inputs_NCHW = training_inputs(inputs, self._parts.normalize)
            with self._parts.precision.autocast():
                return self._network(inputs_NCHW)
        images_NHWC = inputs.images
        if inputs.trivial is not None:
            images_NHWC = trivial_augment(images_NHWC, inputs.trivial)
        inputs_NDHW = self._kernels.s2d_inputs(
            images_NHWC,
            self._parts.normalize.scale,
            self._parts.normalize.shift,
            self._shape,
            HALVES.get(self._parts.precision.name, torch.float32),
            inputs.erase,
            inputs.mix,
        )
        with self._parts.precision.autocast():
            weights_ODKK = s2d_weights(self._network.weight_of(self._conv.weight), self._shape.stride)
            return self._network.forward_from(conv2d(inputs_NDHW, weights_ODKK))
