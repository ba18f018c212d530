"""One optimiser step, and one pass over a split: plain functions, no files, no globals."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.utils.dlpack
from torch import Tensor
from torch.nn.functional import cross_entropy

from data_pipeline.loading.prefetch import Batch
from data_pipeline.transforms.rng import hash_at
from train.distributed.compression import PowerSGD
from train.distributed.hybrid import HybridParallel, Parallel
from train.distributed.world import World
from train.health.metrics import AccuracyMeter, Metrics
from train.health.noise_scale import NoiseMeter
from train.health.nonfinite import Guard, propagate_nonfinite, restore_buffers
from train.models.alexnet import AlexNet, Normalize
from train.optim.ema import ModelEma
from train.optim.mixup import average_views, mix_inputs, mixed_losses
from train.optim.precision import Precision
from train.optim.sgd import set_rate

# Shapes: N samples of one batch, H and W rows and columns, C classes.

EVAL_BATCH = 256
"""Most images that one rank evaluates at once."""


def eval_micro_batch(ten_crop: bool) -> int:
    """Most images of one evaluation batch: a tenth of `EVAL_BATCH` where each image has ten views."""
    return EVAL_BATCH // 10 if ten_crop else EVAL_BATCH


class BrokenOffError(Exception):
    """An evaluation that was told to stop."""


@dataclass(frozen=True)
class TrainStep:
    """What a step needs and does not change: the parts, put together once by `train.main`.

    Args:
        network: the bare model; under hybrid parallelism with this rank's part of the fully connected layers
            (`train.distributed.hybrid.whole_network` has all of them, for evaluation and checkpoints).
        parallel: the same model over all ranks, for training.
        guard: keeps what is not finite from the weights.
        global_batch: samples of a step over all ranks; the loss is divided by it.
        seed: of the dropout masks.
        label_smoothing: see `train.optim.mixup.mixed_losses`.
        average: of the weights, where one is kept; it is what is evaluated.
        powersgd: what compression by PowerSGD remembers; None without it.
        noise: measures the gradient noise scale; None where nobody asks.
    """

    network: AlexNet
    parallel: Parallel
    normalize: Normalize
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    guard: Guard
    precision: Precision
    world: World
    global_batch: int
    seed: int
    label_smoothing: float = 0.0
    average: ModelEma | None = None
    powersgd: PowerSGD | None = None
    noise: NoiseMeter | None = None


def to_device(batch: Batch, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """A batch's images, labels and validity as tensors on a device, without waiting for the copies.

    Returns:
        uint8 (N, H, W, 3) or, for V views of each image, (N, V, H, W, 3); int64 (N,), bool (N,).
    """
    parts = (
        torch.utils.dlpack.from_dlpack(batch.images),
        torch.from_numpy(batch.labels),
        torch.from_numpy(batch.valid),
    )
    if device.type == "cpu":
        return parts
    images, labels, valid = (
        part if part.device == device else part.pin_memory().to(device, non_blocking=True) for part in parts
    )
    return images, labels, valid


def train_step(
    trainer: TrainStep, batches: Sequence[Batch], learning_rate: float, step: int
) -> AccuracyMeter:
    """Forward, backward and update for one global batch.

    Every rank calls this with its own micro-batches, whose number may differ between the ranks. Gradients
    travel during the last backward pass only. Each sample weighs 1 / global_batch wherever it is computed, so
    that the update does not depend on the number of ranks; a sample that could not be read weighs 0. Where
    samples are mixed, the loss is against both labels, and top-1 and top-5 against a sample's own. Where
    the guard finds the gradient bad, the step changes nothing but the guard's counts and float16's scale.

    Args:
        batches: this rank's micro-batches of the step, at least one.
        learning_rate: for this update.
        step: optimiser steps finished before this one.
    Returns:
        This rank's counts, still on the device; of a skipped step, none.
    """
    world, optimizer, scaler, noise = trainer.world, trainer.optimizer, trainer.scaler, trainer.noise
    parallel = trainer.parallel
    # Masks follow from (seed, step, rank), so a resumed run draws those that it would have drawn.
    torch.manual_seed(int(hash_at(trainer.seed, step, world.rank, lane=_LANE_DROPOUT)) >> 1)
    set_rate(optimizer, learning_rate)
    counts = AccuracyMeter(world.device)
    trainer.network.train()
    buffers = [buffer.clone() for buffer in trainer.network.buffers()]
    optimizer.zero_grad(set_to_none=True)
    if isinstance(parallel, HybridParallel):
        with world.named_collective(f"the start of step {step + 1}"):
            parallel.start_step(len(batches), trainer.precision)
    for number, batch in enumerate(batches, start=1):
        images_NHWC, labels_N, valid_N = to_device(batch, world.device)
        last = number == len(batches)
        share = nullcontext() if last else parallel.no_sync()
        with share, world.named_collective(f"the sum of gradients of step {step + 1}"):
            inputs_NCHW = trainer.normalize(images_NHWC)
            if batch.mix is not None:
                inputs_NCHW = mix_inputs(inputs_NCHW, batch.mix)
            with trainer.precision.autocast():
                logits_NC = parallel(inputs_NCHW)
            losses_N = mixed_losses(logits_NC.float(), labels_N, batch.mix, trainer.label_smoothing)
            # DDP averages over the ranks; times world_size makes that the sum.
            loss = (losses_N * valid_N).sum() * (world.world_size / trainer.global_batch)
            if noise is not None:
                noise.start_part()
            torch.autograd.backward(scaler.scale(propagate_nonfinite(loss)))
        if noise is not None:
            noise.end_part(valid_N)
        counts.add(logits_NC.detach(), losses_N.detach(), labels_N, valid_N)
    scaler.unscale_(optimizer)
    gradients = [p.grad for p in trainer.network.parameters() if p.grad is not None]
    if isinstance(parallel, HybridParallel):
        with world.named_collective(f"the norm of the gradient of step {step + 1}"):
            gradients = parallel.agree(scaler, optimizer)
    skip = trainer.guard.should_skip(gradients, step)
    if trainer.powersgd is not None:
        trainer.powersgd.end_step(skip)
    if noise is not None:
        noise.end_step(gradients, scaler.scale(torch.ones((), device=world.device)), skip)
    update(optimizer, skip)
    scaler.update()
    restore_buffers(trainer.network, buffers, skip)
    if trainer.average is not None:
        trainer.average.update(trainer.network, step, skip)
    counts.keep_unless(skip)
    return counts


def update(optimizer: torch.optim.Optimizer, skip: Tensor) -> None:
    """One step of a fused optimiser, or none at all where `skip` is 1, which only the device knows.

    Source: the attributes by which torch.amp.GradScaler tells fused optimisers the same.
    """
    optimizer.found_inf, optimizer.grad_scale = skip, None  # type: ignore[attr-defined]
    optimizer.step()
    del optimizer.found_inf, optimizer.grad_scale  # type: ignore[attr-defined]


_LANE_DROPOUT = 1 << 32
"""Far from the lanes of `data_pipeline.transforms.sampler`, so that no mask repeats a crop's number."""


@torch.inference_mode()
def evaluate(
    network: AlexNet,
    normalize: Normalize,
    batches: Iterable[Batch],
    precision: Precision,
    world: World,
    *,
    num_samples: int,
    stop: Callable[[], bool] | None = None,
) -> Metrics:
    """Loss, top-1 and top-5 over a split, every sample counted once on any number of ranks.

    Args:
        batches: this rank's share of the split; where they hold several views, their softmax is averaged.
        num_samples: size of the split, which the counts of all ranks must add up to.
        stop: asked before each batch whether to break off; the ranks need not agree.
    Returns:
        Metrics of the whole split, the same on every rank.
    Raises:
        BrokenOffError: any rank broke off; on every rank.
    """
    network.eval()
    counts, stopped = AccuracyMeter(world.device), False
    for batch in batches:
        if stop is not None and stop():
            stopped = True
            break
        images_NHWC, labels_N, valid_N = to_device(batch, world.device)
        views = images_NHWC.shape[1:-3]
        with precision.autocast():
            # Past a compiled call: every size of batch would be compiled anew, for a pass without a gradient.
            logits_NC = network.forward(normalize(images_NHWC.flatten(0, len(views)))).float()
        if views:
            logits_NC = average_views(logits_NC, views[0])
        counts.add(logits_NC, cross_entropy(logits_NC, labels_N, reduction="none"), labels_N, valid_N)
    if stop is not None and world.any(stopped):
        raise BrokenOffError("the evaluation was broken off")
    metrics = counts.reduce(world)
    counted = metrics.num_samples + metrics.num_failed
    assert counted == num_samples, f"counted {counted} of {num_samples} samples"
    return metrics
