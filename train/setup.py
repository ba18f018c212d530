"""Builds a run on one rank, new or resumed: data, loader, network, run folder."""

from __future__ import annotations

import logging
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path

import msgspec
import numpy as np
import torch

from data_pipeline.common.errors import UserError
from data_pipeline.datasets.dataset import Contents, Dataset
from data_pipeline.loader import Loader
from data_pipeline.loading.batches import Batch
from data_pipeline.transforms.sampler import steps_per_epoch
from train.checkpoints.background import AsyncCheckpointWriter
from train.checkpoints.format import Progress
from train.checkpoints.load import Checkpoint, load_checkpoint, load_weights
from train.compile.choose import maybe_compile, prepare_lrn
from train.config.schema import RunConfig
from train.data import contents_on_ranks, open_data, open_loader
from train.distributed.ddp import describe_parallel, make_parallel, micro_batch_size, pass_sizes
from train.distributed.hybrid import map_optimizer_state, shard_tensors
from train.distributed.torchrun import env_launch
from train.distributed.world import World, cpu_share
from train.graphs.choose import why_plain
from train.health.metrics import TOP_K
from train.health.noise_scale import NoiseMeter
from train.health.nonfinite import Guard
from train.health.signals import Interrupt
from train.models.alexnet import AlexNet, Normalize, make_model
from train.models.parts import head_of
from train.optim.class_weights import class_weights_of, describe_balance, describe_weights
from train.optim.ema import ModelEma
from train.optim.precision import choose_precision
from train.optim.schedule import describe_lr
from train.optim.sgd import load_optimizer, make_optimizer, start_momentum
from train.pretrained.begin import begin_with_weights
from train.runs.abort import AbortPolicy
from train.runs.changes import apply_changes
from train.runs.folder import RunFolder, create_run
from train.runs.metrics_log import MetricsLog
from train.runs.resume import Start, check_same_data, choose_start, claim_run, rewind
from train.runs.running_metrics import RunningMetrics
from train.state import RunState
from train.step import StepParts, train_step

log = logging.getLogger("train")


def build_run(
    config: RunConfig,
    out: Path | None,
    resume: str,
    world: World,
    stack: ExitStack,
    interrupt: Interrupt | None = None,
    *,
    allow_changed_schedule: bool = False,
) -> RunState:
    """Open the data, build or resume the network, and open the run's folder.

    Args:
        out: folder in which the run's folder is made, or looked for; None for steps that leave no files.
        resume: see `train.runs.resume.choose_start`.
        stack: closes what must be closed.
        interrupt: listens from the end of this call on, when there is a state to save; None to make one.
        allow_changed_schedule: see `train.runs.changes.apply_changes`.
    Raises:
        UserError, CorruptFileError: from the parts, each with what is wrong, where, and what to do.
    """
    if world.device.type == "cpu":
        torch.set_num_threads(config.cpu_threads or cpu_share(world.local_world_size))
    train_set, val_set = open_data(config, world)
    num_steps = steps_per_epoch(len(train_set), config.global_batch)
    data = contents_on_ranks(world, (train_set, val_set))
    start = world.broadcast_object(lambda: choose_start(out, resume, config, env_launch()))
    checkpoint, progress = open_checkpoint(start, config, data, train_set, allow_changed_schedule)
    step, offset = checkpoint.step if checkpoint is not None else 0, progress.step_offset
    parts = make_step_parts(config, train_set, world, checkpoint)
    epochs_left = max(0, config.epochs - (step - offset) // num_steps) if out is not None else 0
    loader = open_loader(config, world, (train_set, val_set), epochs_left, stack)
    num_images = config.epochs * len(train_set)
    log_hardware(parts, loader, num_images)
    folder, writer = open_run_folder(parts, train_set, out, start, step, stack)
    compile_network(parts, num_images, folder)
    row, saved_row = RunningMetrics(world, parts.noise), checkpoint.states["row"] if checkpoint else {}
    row.load_state_dict(saved_row)
    interrupt = interrupt or stack.enter_context(closing(Interrupt()))
    interrupt.listen()
    return RunState(
        config=config,
        parts=parts,
        train_step=partial(train_step, parts),
        train_set=train_set,
        val_set=val_set,
        data=data,
        loader=loader,
        folder=folder,
        writer=writer,
        metrics_log=MetricsLog(folder, step, num_steps, noise=config.log_noise_scale, step_offset=offset),
        abort=AbortPolicy(config, train_set, folder, writer, offset),
        interrupt=interrupt,
        steps_per_epoch=num_steps,
        row=row,
        progress=msgspec.structs.replace(progress, init=parts.init or progress.init),
        step=step,
        skipped=int(saved_row.get("skipped", parts.guard.read().total)),
        evaluated=checkpoint is not None and "top1" in checkpoint.metrics,
    )


def open_checkpoint(
    start: Start, config: RunConfig, data: dict[str, Contents], train_set: Dataset, allowed: bool
) -> tuple[Checkpoint | None, Progress]:
    """Load the checkpoint to resume from, and its history, once it was compared with the run of now.

    Args:
        allowed: see `train.runs.changes.apply_changes`.
    """
    if start.checkpoint is None:
        return None, Progress()
    checkpoint = load_checkpoint(start.checkpoint)
    check_same_data(checkpoint, data, train_set.root)
    return checkpoint, apply_changes(config, checkpoint, len(train_set), allowed=allowed)


def make_step_parts(
    config: RunConfig, train_set: Dataset, world: World, checkpoint: Checkpoint | None
) -> StepParts:
    """Build the network with its optimiser, from the seed, a checkpoint or `init_from`, over the ranks.

    Raises:
        UserError: a checkpoint of another model or of other classes, weights of other classes, a precision
            that the device lacks, or see `begin_with_weights`.
    """
    precision = choose_precision(config.precision, world.device)
    weights_C = class_weights_of(config, train_set)
    torch.manual_seed(config.seed)
    crop_px = config.preprocessing.crop_px
    network = make_model(config.model, num_classes=len(train_set.classes), crop_px=crop_px).to(world.device)
    if checkpoint is not None:
        if checkpoint.classes != train_set.classes:
            raise UserError(f"{checkpoint.folder} was trained on other classes than {train_set.root} has")
        load_weights(network, checkpoint.model_state, source=checkpoint.folder)
        if not checkpoint.states["optimizer"]:
            raise UserError(f"{checkpoint.folder} holds weights alone: there is nothing to go on with")
    init = begin_with_weights(network, config, train_set.classes, world) if checkpoint is None else None
    if config.freeze == "features":  # they get no gradient, decay or momentum
        network.features.requires_grad_(False)
    parallel = make_parallel(network, config, world)  # first: it may shard the parameters
    parts = StepParts(
        network=network,
        parallel=parallel,
        normalize=Normalize(config.preprocessing).to(world.device),
        optimizer=make_optimizer(network, config.optimizer, head_of(network)[1], config.head_rate),
        scaler=precision.make_scaler(),
        guard=Guard(world.device, max_skipped=config.max_skipped, spike_factor=config.spike_factor),
        precision=precision,
        world=world,
        config=config,
        num_passes=len(pass_sizes(config, world)),
        ema=ModelEma(network, config.ema_decay) if config.ema_decay else None,
        noise=make_noise_meter(network, config, world) if config.log_noise_scale else None,
        init=init,
        class_weights=None if weights_C is None else torch.tensor(weights_C).float().to(world.device),
    )
    if checkpoint is not None:
        restore_parts(parts, checkpoint)
    start_momentum(parts.optimizer)
    return parts


def make_noise_meter(network: AlexNet, config: RunConfig, world: World) -> NoiseMeter:
    """Make the meter of the gradient noise scale.

    Raises:
        UserError: each batch is a single part, of which no variance can be measured.
    """
    micro_batch = micro_batch_size(config, world)
    if world.world_size == 1 and micro_batch == config.global_batch:
        raise UserError(
            "log_noise_scale compares the gradients of a batch's parts, and here a batch is one part: use "
            f"more ranks, or --set micro_batch={max(1, micro_batch // 2)}"
        )
    return NoiseMeter(network, world, config.global_batch)


def restore_parts(parts: StepParts, checkpoint: Checkpoint) -> None:
    """Restore the optimiser, loss scale, guard and moving average of a checkpoint."""
    states, parallel, optimizer = checkpoint.states, parts.parallel, parts.optimizer
    load_optimizer(optimizer, map_optimizer_state(parallel, optimizer, states["optimizer"], shard_tensors))
    # Imported weights have neither of these two, and a run in another precision no loss scale.
    if states["scaler"]:
        parts.scaler.load_state_dict(states["scaler"])
    if states["guard"]:
        parts.guard.load_state_dict(states["guard"])
    if parts.ema is not None:
        parts.ema.load(shard_tensors(parallel, checkpoint.average_state))


def log_hardware(parts: StepParts, loader: Loader, num_images: int) -> None:
    """Log, on rank 0, what computes, decodes and reads, how a batch is split, and which step runs and why.

    Args:
        num_images: how many images the whole run trains on.
    """
    config, world, backend = parts.config, parts.world, loader.backend
    if not world.is_main:
        return
    micro_batch, why = micro_batch_size(config, world), why_plain(config, world, num_images)
    step = f"the plain step ({why})" if why is not None else "a fast step if it is proved right and faster"
    log.info(
        f"{world.world_size} rank(s) on {world.device_name}, {parts.precision.name} "
        f"({parts.precision.reason}), {backend.name} decoding on the {backend.device}; "
        f"batch {config.global_batch} in {parts.num_passes} pass(es) of up to {micro_batch} a rank; {step}"
    )
    if config.parallel != "ddp" or config.compress != "none":
        log.info(describe_parallel(config, world))


def log_training(config: RunConfig, train_set: Dataset) -> None:
    """Log what the configuration does not show at a glance."""
    log.info(describe_lr(config.schedule, config.global_batch))
    if config.ema_decay:
        log.info(f"the average of the weights (ema_decay {config.ema_decay:g}) is evaluated and exported")
    if config.freeze == "features":
        log.info("freeze=features: the convolutions do not learn, and batch norms among them do not change")
    if config.data.balance:
        log.info(describe_balance(config, train_set))
    if (weights_C := class_weights_of(config, train_set)) is not None:
        log.info(describe_weights(weights_C, train_set))
    if len(train_set.classes) < TOP_K:
        log.info(f"top5 is 1 by definition: there are only {len(train_set.classes)} classes")


def open_run_folder(
    parts: StepParts, train_set: Dataset, out: Path | None, start: Start, step: int, stack: ExitStack
) -> tuple[RunFolder | None, AsyncCheckpointWriter | None]:
    """Make the run's folder, or bring an earlier run's back to a step, and start the checkpoint writer.

    Returns:
        Both on rank 0; on the others, and where `out` is None, neither.
    """
    config = parts.config
    if out is None or not parts.world.is_main:
        return None, None
    log_training(config, train_set)
    folder = RunFolder(start.run) if start.run is not None else create_run(out, config)
    claim_run(folder, env_launch())
    folder.write_config(config)
    log.info(f"run folder: {folder.path}")
    best = rewind(folder, step) if start.run is not None else None
    writer = AsyncCheckpointWriter(folder.checkpoints, config, best, folder.sync_rows)
    return folder, stack.enter_context(closing(writer))


def compile_network(parts: StepParts, num_images: int, folder: RunFolder | None) -> None:
    """Compile LRN, and the network as a whole, where that is configured and pays; see `log_hardware`."""
    config, crop_px = parts.config, parts.config.preprocessing.crop_px
    prepare_lrn(
        parts.network,
        config.lrn,
        crop_px=crop_px,
        num_images=num_images,
        precision=parts.precision,
        world=parts.world,
    )
    if config.compile:
        run = folder.path if folder is not None else None
        micro_batch = micro_batch_size(config, parts.world)
        timed = not config.deterministic
        maybe_compile(parts.parallel, micro_batch, crop_px, parts.precision, parts.world, run, timed=timed)


def make_noise_parts(config: RunConfig, num_classes: int, world: World) -> StepParts:
    """Build the parts of a run whose data has so many classes and no images."""
    classes = tuple(f"class-{number}" for number in range(num_classes))
    return make_step_parts(config, Dataset(Path(), "train", (), np.zeros(0, np.int64), classes), world, None)


def noise_batch(size: int, crop_px: int, num_classes: int) -> Batch:
    """Return a step's samples without files behind them; the same ones every time."""
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (size, crop_px, crop_px, 3), dtype=np.uint8)
    labels, places = random.integers(0, num_classes, size), np.arange(size)
    return Batch(images, labels, np.ones(size, bool), places, places, (), (), step=0, last=True)
