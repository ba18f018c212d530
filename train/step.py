"""One optimiser step: a plain function, no files, no globals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data_pipeline.loading.batches import Batch
from data_pipeline.results.card import InitRecord
from train.config.schema import RunConfig
from train.distributed.hybrid import HybridParallel, Parallel
from train.distributed.world import World
from train.health.metrics import AccuracyMeter
from train.health.noise_scale import NoiseMeter
from train.health.nonfinite import Guard, propagate_nonfinite, restore_buffers
from train.inputs.erase import erase_inputs
from train.inputs.mixup import mix_inputs, mixed_losses
from train.inputs.packed import Arrays, place
from train.inputs.pass_inputs import PassInputs, make_inputs
from train.inputs.trivial import trivial_augment
from train.inputs.values import StepValues, values_of
from train.models.alexnet import AlexNet, Normalize
from train.models.batch_norm import ghost_sums_of, is_synchronized, settle_ghosts
from train.models.dropout import layer_keys_at, masks_of
from train.models.parts import set_training
from train.optim.ema import ModelEma
from train.optim.precision import Precision
from train.optim.sgd import Apply, apply_fused, set_lr, update

# Shapes: N samples of one batch, H and W rows and columns, C classes.


@dataclass(frozen=True)
class StepParts:
    """The components of `train_step`: the network, its optimiser, and what checks and measures them.

    Attributes:
        network: the bare model; under hybrid parallelism with this rank's shards of the fully connected
            layers (`train.distributed.hybrid.whole_network` gathers them, for evaluation and checkpoints).
        parallel: the same model over all ranks, for training.
        guard: skips steps whose gradient is not finite.
        config: of which a step uses the global batch, the crops' size, the seed of the dropout masks and the
            label smoothing.
        num_passes: of a step on the rank that has most.
        ema: the moving average of the weights, which is evaluated where there is one.
        noise: measures the gradient noise scale, with `log_noise_scale`.
        init: the weights from elsewhere that the network began with; None at any later start.
        class_weights: (C) float32, of the classes in the loss; None where all weigh the same.
    """

    network: AlexNet
    parallel: Parallel
    normalize: Normalize
    optimizer: torch.optim.SGD
    scaler: torch.amp.GradScaler
    guard: Guard
    precision: Precision
    world: World
    config: RunConfig
    num_passes: int
    ema: ModelEma | None = None
    noise: NoiseMeter | None = None
    init: InitRecord | None = None
    class_weights: Tensor | None = None


StepFn = Callable[[Sequence[Batch], float, int], AccuracyMeter]
"""One step of this rank's micro-batches, at a learning rate, after so many others; see `train_step`."""


def training_inputs(inputs: PassInputs, normalize: Normalize) -> Tensor:
    """Return the network's inputs for a batch in training: augmented where it says so, and normalised.

    In the order of torchvision's references: TrivialAugment, normalising, erasing, mixing.
    """
    images_NHWC = inputs.images
    if inputs.trivial is not None:
        images_NHWC = trivial_augment(images_NHWC, inputs.trivial)
    inputs_NCHW: Tensor = normalize(images_NHWC)
    if inputs.erase is not None:
        inputs_NCHW = erase_inputs(inputs_NCHW, inputs.erase)
    if inputs.mix is not None:
        inputs_NCHW = mix_inputs(inputs_NCHW, inputs.mix)
    return inputs_NCHW


def start_values(parts: StepParts, learning_rate: float, step: int) -> Arrays:
    """Set the optimiser's rates on the host, and return the numbers of a step, for `values_of`."""
    share = parts.ema.share_at(step) if parts.ema is not None else 0.0
    return {
        "step": np.array(step, dtype=np.int64),
        "rates": np.array(set_lr(parts.optimizer, learning_rate), dtype=np.float32),
        "average_share": np.array(share, dtype=np.float32),
        "keys": layer_keys_at(parts.config.seed, step, len(masks_of(parts.network).keys_L2)),
    }


def train_step(parts: StepParts, batches: Sequence[Batch], learning_rate: float, step: int) -> AccuracyMeter:
    """Forward, backward and update for one global batch.

    Every rank calls this with its own micro-batches, whose number may differ between the ranks. Gradients
    are reduced over the ranks in the last backward pass only. Where the guard finds the gradient bad, the
    step changes nothing but the guard's counts and float16's loss scale.

    Args:
        batches: this rank's micro-batches of the step, at least one.
        learning_rate: for this update.
        step: optimiser steps finished before this one.
    Returns:
        This rank's counts, still on the device; zeros for a skipped step.
    """
    world, network, optimizer, scaler = parts.world, parts.network, parts.optimizer, parts.scaler
    values = values_of(place(start_values(parts, learning_rate, step), world.device))
    masks = masks_of(network)
    masks.keys_L2 = values.keys
    meter = AccuracyMeter(world.device)
    set_training(network, parts.config.freeze)
    buffers = [buffer.clone() for buffer in network.buffers()]
    optimizer.zero_grad(set_to_none=True)
    with world.named_collective(f"the start of step {step + 1}"):
        start_passes(parts, len(batches))
    for number, batch in enumerate(batches, start=1):
        sync = nullcontext() if number == len(batches) else parts.parallel.no_sync()
        with sync, world.named_collective(f"the sum of gradients of step {step + 1}"):
            accumulate_gradients(parts, make_inputs(batch, world.device), meter)
    masks.rows_N = None  # those of the last pass are nobody else's
    scaler.unscale_(optimizer)
    gradients = [p.grad for p in network.parameters() if p.grad is not None]
    if isinstance(parts.parallel, HybridParallel):
        with world.named_collective(f"the norm of the gradient of step {step + 1}"):
            gradients = parts.parallel.global_norm_tensors(scaler, optimizer)
    skip = parts.guard.should_skip(gradients, values.step)
    if parts.noise is not None:
        parts.noise.end_step(gradients, scaler.scale(torch.ones((), device=world.device)), skip)
    ghosts = ghost_sums_of(network)
    if ghosts is not None and world.world_size > 1:
        world.all_reduce(ghosts)
    end_step(parts, values, skip, ghosts, buffers, meter)
    return meter


def start_passes(parts: StepParts, num_batches: int) -> None:
    """Join the passes of a step that other ranks have micro-batches for and this one has not.

    So the last pass, in which gradients are reduced, is one of all ranks. Ranks join where they share a
    pass: in the sharded layers, and in norms whose statistics are over all ranks.
    """
    crop_px = parts.config.preprocessing.crop_px
    none_NCHW = torch.empty(0, 3, crop_px, crop_px, device=parts.world.device)
    if isinstance(parts.parallel, HybridParallel):
        parts.parallel.start_step(num_batches, none_NCHW, parts.precision)
    elif is_synchronized(parts.network):
        for _ in range(parts.num_passes - num_batches):
            with parts.parallel.no_sync():
                with parts.precision.autocast():
                    logits_NC = parts.parallel(none_NCHW)
                torch.autograd.backward(logits_NC.sum())


def accumulate_gradients(parts: StepParts, inputs: PassInputs, meter: AccuracyMeter) -> None:
    """Forward and backward pass of one micro-batch."""
    inputs_NCHW = training_inputs(inputs, parts.normalize)
    masks_of(parts.network).rows_N = inputs.rows
    with parts.precision.autocast():
        logits_NC = parts.parallel(inputs_NCHW)
    # DDP averages over the ranks; times world_size makes that the sum.
    loss = count_losses(parts, inputs, logits_NC, meter, parts.world.world_size)
    if parts.noise is not None:
        parts.noise.start_part()
    torch.autograd.backward(loss)
    if parts.noise is not None:
        parts.noise.end_part(inputs.valid)


def count_losses(
    parts: StepParts, inputs: PassInputs, logits_NC: Tensor, meter: AccuracyMeter, factor: int = 1
) -> Tensor:
    """Count a micro-batch, and return the loss whose gradient its backward pass computes, ().

    Each sample weighs 1 / global_batch on whichever rank it is, so that the update does not depend on the
    number of ranks, times its class's weight; a sample that could not be read weighs 0. Where samples are
    mixed, the loss is with both labels, and top-1 and top-5 are with a sample's own.

    Args:
        factor: of the loss, beside float16's loss scale.
    """
    losses_N = mixed_losses(
        logits_NC.float(), inputs.labels, inputs.mix, parts.config.label_smoothing, parts.class_weights
    )
    loss = (losses_N * inputs.valid).sum() * (factor / parts.config.global_batch)
    meter.add(logits_NC.detach(), losses_N.detach(), inputs.labels, inputs.valid)
    scaled: Tensor = parts.scaler.scale(propagate_nonfinite(loss))
    return scaled


def end_step(
    parts: StepParts,
    values: StepValues,
    skip: Tensor,
    ghosts: Tensor | None,
    buffers: Sequence[Tensor],
    meter: AccuracyMeter,
    apply: Apply = apply_fused,
) -> None:
    """Update weights, loss scale, running statistics and average in place; or, skipped, the loss scale alone.

    Args:
        skip: () float32, the guard's answer, which only the device knows.
        ghosts: `ghost_sums_of` the network, added up over the ranks.
        buffers: the network's as they were before the step.
        meter: this rank's counts of the step; zeros for a skipped one.
        apply: changes the weights.
    """
    update(parts.optimizer, skip, values.rates, apply)
    parts.scaler.update()
    settle_ghosts(parts.network, ghosts)
    restore_buffers(parts.network, buffers, skip)
    if parts.ema is not None:
        parts.ema.update(parts.network, values.average_share, skip)
    meter.clear_if(skip)
