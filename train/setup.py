"""Putting the parts of a run together, new or resumed, on one rank."""

from __future__ import annotations

import logging
import math
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path

import torch

from data_pipeline.common.errors import UserError
from data_pipeline.common.text import printable
from data_pipeline.datasets.dataset import Contents, Dataset, check_same_classes
from data_pipeline.datasets.demo import DEMO_ROOT, write_demo
from data_pipeline.datasets.open import open_dataset
from data_pipeline.loader import Loader, make_backend
from data_pipeline.loading.readers import ReaderPool
from data_pipeline.transforms.sampler import steps_per_epoch
from train.checkpoints.background import AsyncCheckpointWriter
from train.checkpoints.load import Checkpoint, load_checkpoint, load_weights
from train.checkpoints.safe_load import Progress
from train.compile.choose import maybe_compile, prepare_lrn
from train.config.load import READERS, RunConfig
from train.distributed.ddp import batch_sizes, compress_gradients, describe_parallel, make_parallel
from train.distributed.hybrid import shard_optimizer_state, shard_tensors
from train.distributed.world import World, cpu_share, env_launch
from train.health.metrics import TOP_K
from train.health.noise_scale import NoiseMeter
from train.health.nonfinite import Guard
from train.health.signals import Interrupt, remember_signals
from train.models.alexnet import Normalize, make_model
from train.optim.ema import ModelEma
from train.optim.precision import choose_precision
from train.optim.schedule import describe_rate
from train.optim.sgd import load_optimizer, make_optimizer, start_momentum
from train.runs.folder import RunFolder, create_run, go_back_to
from train.runs.open_row import RunningMetrics
from train.runs.resume import Start, choose_start, claim_run
from train.step import EVAL_BATCH, TrainStep

log = logging.getLogger("train")


@dataclass
class RunState:
    """One run on one rank: the parts, and how far it has come.

    Args:
        folder: the run's folder; None on the ranks other than 0, which write nothing.
        data: which samples the splits hold.
        micro_batch: most samples that this rank takes through the network at once.
        step: optimiser steps finished.
        loader: makes the batches of both splits.
        saver: what writes checkpoints; None on the ranks other than 0.
        row: what was counted since the last training row.
        unevaluated: whether the epoch that ended with the last step has not been evaluated yet.
        progress: the run's course so far, which is the same on all ranks.
        skipped: steps that the guard had skipped when the last row was written.
        unsaved: why the last checkpoint could not be written, if so; known when the run ends or is stopped.
        held_up_s: for how long training has waited for checkpoints, in seconds.
        interrupt: whether a signal has asked this rank to stop.
    """

    config: RunConfig
    trainer: TrainStep
    train_set: Dataset
    val_set: Dataset
    data: dict[str, Contents]
    loader: Loader
    folder: RunFolder | None
    micro_batch: int
    steps_per_epoch: int
    step: int
    saver: AsyncCheckpointWriter | None
    row: RunningMetrics
    unevaluated: bool
    progress: Progress
    skipped: int = 0
    unsaved: str | None = None
    held_up_s: float = 0.0
    interrupt: Interrupt = field(default_factory=Interrupt)

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the whole run."""
        return self.config.epochs * self.steps_per_epoch


def build_run(
    config: RunConfig,
    out: Path | None,
    resume: str,
    world: World,
    stack: ExitStack,
    interrupt: Interrupt | None = None,
) -> RunState:
    """Load the data, build or resume the model, choose backend and precision; rank 0 says what was chosen.

    Args:
        out: folder in which the run's folder is made, or looked for; None for steps that leave nothing.
        resume: see `train.runs.resume.choose_start`.
        stack: closes what must be closed.
        interrupt: remembers signals from the end of this call on; before that there is nothing to save, and
            a signal ends the process. None to make one.
    Raises:
        UserError, CorruptFileError: from the parts, each with what is wrong, where, and what to do.
    """
    if world.device.type == "cpu":
        torch.set_num_threads(config.cpu_threads or cpu_share(world.local_world_size))
    train_set, val_set = open_data(config, world)
    num_steps = steps_per_epoch(len(train_set), config.global_batch)
    launch, start = env_launch(), Start(run=None, checkpoint=None)
    if out is not None:
        start = world.broadcast_object(lambda: choose_start(out, resume, config, launch))
    checkpoint = load_checkpoint(start.checkpoint) if start.checkpoint is not None else None
    data = {dataset.split: dataset.contents() for dataset in (train_set, val_set)}
    if checkpoint is not None:
        check_same_data(checkpoint, data, train_set.root)
    trainer = make_trainer(config, train_set, world, checkpoint)

    rank_batch, micro_batch = batch_sizes(config, world)
    if config.log_noise_scale and world.world_size == 1 and micro_batch == config.global_batch:
        raise UserError(
            "log_noise_scale compares the gradients of a batch's parts, and here a batch is one part: use "
            f"more ranks, or --set micro_batch={max(1, micro_batch // 2)}"
        )
    backend = make_backend(
        config.data.backend,
        device="gpu" if world.device.type == "cuda" and config.data.backend != "pillow" else "cpu",
        device_id=world.local_rank,
        preprocessing=config.preprocessing,
        max_batch=max(micro_batch, EVAL_BATCH),
        num_threads=config.data.threads or cpu_share(world.local_world_size),
    )
    stack.enter_context(closing(backend))
    num_readers = config.data.readers
    if num_readers is None:
        num_readers = min(READERS, cpu_share(world.local_world_size)) if backend.device == "gpu" else 0
    readers = ReaderPool((train_set, val_set), num_readers) if num_readers else None
    if readers is not None:
        stack.enter_context(closing(readers))

    folder = saver = None
    step = checkpoint.step if checkpoint is not None else 0
    if world.is_main:
        log.info(
            f"{world.world_size} rank(s) on {world.device_name}, {trainer.precision.name} "
            f"({trainer.precision.reason}), {backend.name} decoding on the {backend.device}, "
            f"{f'{num_readers} process(es)' if readers is not None else 'threads'} reading; "
            f"batch {config.global_batch} in {math.ceil(rank_batch / micro_batch)} pass(es) "
            f"of up to {micro_batch} a rank"
        )
        if config.parallel != "ddp" or config.compress != "none":
            log.info(describe_parallel(config, world, step))
    if world.is_main and out is not None:
        log.info(describe_rate(config.schedule, config.global_batch))
        if trainer.average is not None:
            log.info(f"the average of the weights (ema_decay {config.ema_decay:g}) is evaluated and exported")
        if len(train_set.classes) < TOP_K:
            log.info(f"top5 is 1 by definition: there are only {len(train_set.classes)} classes")
        folder = RunFolder(start.run) if start.run is not None else create_run(out, config)
        claim_run(folder, launch)
        log.info(f"run folder: {folder.path}")
        best = go_back_to(folder, step) if start.run is not None else None
        saver = stack.enter_context(closing(AsyncCheckpointWriter(folder, config, best)))
    prepare_lrn(
        trainer.network,
        config.lrn,
        crop_px=config.preprocessing.crop_px,
        num_images=config.epochs * len(train_set),
        precision=trainer.precision,
        world=world,
    )
    if config.compile:
        run = folder.path if folder is not None else None
        crop_px = config.preprocessing.crop_px
        maybe_compile(trainer.parallel, micro_batch, crop_px, trainer.precision, world, run)
    row, open_row = (
        RunningMetrics(world, trainer.noise),
        checkpoint.parts["row"] if checkpoint is not None else {},
    )
    row.load_state_dict(open_row)
    interrupt = interrupt or stack.enter_context(remember_signals())
    interrupt.listen()
    return RunState(
        config=config,
        trainer=trainer,
        train_set=train_set,
        val_set=val_set,
        data=data,
        loader=Loader(backend, config.preprocessing, prefetch=config.data.prefetch, readers=readers),
        folder=folder,
        micro_batch=micro_batch,
        steps_per_epoch=num_steps,
        step=step,
        saver=saver,
        row=row,
        unevaluated=step > 0 and step % num_steps == 0 and not (checkpoint and "top1" in checkpoint.metrics),
        progress=checkpoint.progress if checkpoint is not None else Progress(),
        skipped=int(open_row.get("skipped", trainer.guard.read().total)),
        interrupt=interrupt,
    )


def make_trainer(
    config: RunConfig, train_set: Dataset, world: World, checkpoint: Checkpoint | None
) -> TrainStep:
    """The network with its optimiser, from the seed or from a checkpoint, over the ranks as configured.

    Raises:
        UserError: a checkpoint of another model or of other classes.
    """
    precision = choose_precision(config.precision, world.device)
    torch.manual_seed(config.seed)
    network = make_model(
        config.model, num_classes=len(train_set.classes), crop_px=config.preprocessing.crop_px
    ).to(world.device)
    if checkpoint is not None:
        if checkpoint.classes != train_set.classes:
            raise UserError(f"{checkpoint.folder} was trained on other classes than {train_set.root} has")
        load_weights(network, checkpoint.model_state, source=checkpoint.folder)
        if not checkpoint.parts["optimizer"]:
            raise UserError(f"{checkpoint.folder} holds weights alone: there is nothing to go on with")
    parallel = make_parallel(network, config, world)
    powersgd = compress_gradients(parallel, config, precision, checkpoint.step if checkpoint else 0)
    optimizer, scaler = make_optimizer(network, config.optimizer), precision.make_scaler()
    guard = Guard(world.device, max_skipped=config.max_skipped, spike_factor=config.spike_factor)
    if checkpoint is not None:
        load_optimizer(optimizer, shard_optimizer_state(parallel, optimizer, checkpoint.parts["optimizer"]))
        scaler.load_state_dict(checkpoint.parts["scaler"])
        guard.load_state_dict(checkpoint.parts["guard"])
    start_momentum(optimizer)
    average = ModelEma(network, config.ema_decay) if config.ema_decay else None
    if average is not None and checkpoint is not None:
        average.load(shard_tensors(parallel, checkpoint.average_state))
    return TrainStep(
        network=network,
        parallel=parallel,
        powersgd=powersgd,
        normalize=Normalize(config.preprocessing).to(world.device),
        optimizer=optimizer,
        scaler=scaler,
        guard=guard,
        precision=precision,
        world=world,
        global_batch=config.global_batch,
        seed=config.seed,
        label_smoothing=config.label_smoothing,
        average=average,
        noise=NoiseMeter(network, world, config.global_batch) if config.log_noise_scale else None,
    )


def check_same_data(checkpoint: Checkpoint, data: dict[str, Contents], root: Path) -> None:
    """Refuse to resume on other training images: a position in the stream would mean another sample.

    Other validation images are told: the rows before and after do not compare.

    Raises:
        UserError: with both counts, and what to do.
    """
    if not checkpoint.data:
        log.info(f"{checkpoint.folder} does not say which images it was trained on: taken to be the same")
        return
    for split, now in data.items():
        then = checkpoint.data.get(split)
        if then is None or then.sha256 == now.sha256:
            continue
        what = (
            f"the {split} images of {printable(root)} are not those that {checkpoint.folder} was made with "
            f"({_count(then)} then, {_count(now)} now)"
        )
        if split == "train":
            raise UserError(
                f"cannot resume: {what}, so the order would change; restore the data and its quarantine "
                "list, or start a new run with --resume none"
            )
        log.warning(f"{what}: metrics before and after this point do not compare")


def _count(contents: Contents) -> str:
    return f"{contents.num_samples} and {contents.num_quarantined} in quarantine"


def open_data(config: RunConfig, world: World) -> tuple[Dataset, Dataset]:
    """The training and validation splits; the demo data is written first where it is wanted and missing.

    Raises:
        UserError: no data folder named, or one that is not as it should be.
    """
    if config.data.root is None:
        raise UserError(f"recipe {config.recipe} needs data: --data DIR, with train/ and val/ in it")
    root = Path(config.data.root)
    if root == DEMO_ROOT:
        if world.local_rank == 0:
            write_demo(root)
        world.barrier()
    train_set, val_set = open_dataset(root, "train"), open_dataset(root, "val")
    check_same_classes(train_set, val_set)
    return train_set, val_set
