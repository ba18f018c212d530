"""One optimiser step: a plain function, no files, no globals."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.utils.dlpack
from torch import Tensor

from data_pipeline.loading.batches import Batch
from data_pipeline.loading.cache import CachedCrops
from train.checkpoints.format import InitRecord
from train.config.schema import RunConfig
from train.distributed.hybrid import HybridParallel, Parallel
from train.distributed.world import World
from train.health.metrics import AccuracyMeter
from train.health.noise_scale import NoiseMeter
from train.health.nonfinite import Guard, propagate_nonfinite, restore_buffers
from train.kernels.borrowed import lender_of
from train.kernels.cached_crops import crop_cached
from train.kernels.erase import erase_inputs
from train.kernels.mixup import mix_inputs, mixed_losses, tensor_to_device
from train.kernels.trivial import trivial_augment
from train.models.alexnet import AlexNet, Normalize
from train.models.batch_norm import count_ghosts_in, is_synchronized
from train.models.dropout import layer_keys_at, masks_of
from train.models.parts import set_training
from train.optim.ema import ModelEma
from train.optim.precision import Precision
from train.optim.sgd import set_lr

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


def to_device(batch: Batch, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return a batch's images, labels and validity on a device, without waiting for the copies.

    Returns:
        uint8 (N, H, W, 3) or, for V views of each image, (N, V, H, W, 3); int64 (N,), bool (N,).
    """
    labels_N, valid_N = tensor_to_device(batch.labels, device), tensor_to_device(batch.valid, device)
    return images_on_device(batch.images, device), labels_N, valid_N


def images_on_device(images: Any, device: torch.device) -> Tensor:
    """Return the images of a batch on a device: cropped there, taken over from the decoder, or copied."""
    if isinstance(images, CachedCrops):
        return crop_cached(images.pixels, images.indices, images.crops)
    tensor = torch.utils.dlpack.from_dlpack(images)
    if tensor.is_cuda and tensor.device == device:
        return lender_of(device).take_over(tensor)
    return tensor_to_device(tensor, device)


def training_inputs(batch: Batch, images_NHWC: Tensor, normalize: Normalize) -> Tensor:
    """Return the network's inputs for a batch in training: augmented where it says so, and normalised.

    In the order of torchvision's references: TrivialAugment, normalising, erasing, mixing.

    Args:
        images_NHWC: those of the batch, on the device.
    """
    if batch.trivial is not None:
        images_NHWC = trivial_augment(images_NHWC, batch.trivial)
    inputs_NCHW: Tensor = normalize(images_NHWC)
    if batch.erase is not None:
        inputs_NCHW = erase_inputs(inputs_NCHW, batch.erase)
    if batch.mix is not None:
        inputs_NCHW = mix_inputs(inputs_NCHW, batch.mix)
    return inputs_NCHW


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
    masks = masks_of(network)
    keys_L2 = layer_keys_at(parts.config.seed, step, len(masks.keys_L2))
    masks.keys_L2 = tensor_to_device(keys_L2, world.device)
    set_lr(optimizer, learning_rate)
    meter = AccuracyMeter(world.device)
    set_training(network, parts.config.freeze)
    buffers = [buffer.clone() for buffer in network.buffers()]
    optimizer.zero_grad(set_to_none=True)
    with world.named_collective(f"the start of step {step + 1}"):
        start_passes(parts, len(batches))
    for number, batch in enumerate(batches, start=1):
        sync = nullcontext() if number == len(batches) else parts.parallel.no_sync()
        with sync, world.named_collective(f"the sum of gradients of step {step + 1}"):
            accumulate_gradients(parts, batch, meter)
    masks.rows_N = None  # those of the last pass are nobody else's
    scaler.unscale_(optimizer)
    gradients = [p.grad for p in network.parameters() if p.grad is not None]
    if isinstance(parts.parallel, HybridParallel):
        with world.named_collective(f"the norm of the gradient of step {step + 1}"):
            gradients = parts.parallel.global_norm_tensors(scaler, optimizer)
    skip = parts.guard.should_skip(gradients, step)
    if parts.noise is not None:
        parts.noise.end_step(gradients, scaler.scale(torch.ones((), device=world.device)), skip)
    update(optimizer, skip)
    scaler.update()
    count_ghosts_in(network, world)
    restore_buffers(network, buffers, skip)
    if parts.ema is not None:
        parts.ema.update(network, step, skip)
    meter.clear_if(skip)
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


def accumulate_gradients(parts: StepParts, batch: Batch, meter: AccuracyMeter) -> None:
    """Forward and backward pass of one micro-batch.

    Each sample weighs 1 / global_batch on whichever rank it is, so that the update does not depend on the
    number of ranks, times its class's weight; a sample that could not be read weighs 0. Where samples are
    mixed, the loss is with both labels, and top-1 and top-5 are with a sample's own.
    """
    images_NHWC, labels_N, valid_N = to_device(batch, parts.world.device)
    inputs_NCHW = training_inputs(batch, images_NHWC, parts.normalize)
    rows_N = tensor_to_device(batch.positions.astype(np.int32), parts.world.device)
    masks_of(parts.network).rows_N = rows_N
    with parts.precision.autocast():
        logits_NC = parts.parallel(inputs_NCHW)
    losses_N = mixed_losses(
        logits_NC.float(), labels_N, batch.mix, parts.config.label_smoothing, parts.class_weights
    )
    # DDP averages over the ranks; times world_size makes that the sum.
    loss = (losses_N * valid_N).sum() * (parts.world.world_size / parts.config.global_batch)
    if parts.noise is not None:
        parts.noise.start_part()
    torch.autograd.backward(parts.scaler.scale(propagate_nonfinite(loss)))
    if parts.noise is not None:
        parts.noise.end_part(valid_N)
    meter.add(logits_NC.detach(), losses_N.detach(), labels_N, valid_N)


def update(optimizer: torch.optim.Optimizer, skip: Tensor) -> None:
    """Apply one step of a fused optimiser, or none if `skip` is 1, which only the device knows.

    Source: the attributes by which torch.amp.GradScaler makes fused optimisers skip a step.
    """
    optimizer.found_inf, optimizer.grad_scale = skip, None  # type: ignore[attr-defined]
    optimizer.step()
    del optimizer.found_inf, optimizer.grad_scale  # type: ignore[attr-defined]
