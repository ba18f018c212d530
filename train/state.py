"""The state of a run on one rank, and the snapshot of it that a checkpoint holds."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

import msgspec
import torch

from data_pipeline.datasets.dataset import Contents, Dataset
from data_pipeline.loader import Loader
from train.checkpoints.background import AsyncCheckpointWriter
from train.checkpoints.format import Progress, Snapshot
from train.config.schema import RunConfig
from train.distributed.hybrid import gather_tensors, map_optimizer_state
from train.graphs.choose import Course
from train.health.metrics import Metrics
from train.health.signals import Interrupt
from train.optim.schedule import base_lr_for
from train.runs.abort import AbortPolicy
from train.runs.folder import RunFolder
from train.runs.metrics_log import MetricsLog
from train.runs.running_metrics import RunningMetrics
from train.step import StepFn, StepParts


@dataclass
class RunState:
    """One run on one rank: its components, and how far it has come.

    Attributes:
        train_step: one optimiser step with `parts`.
        data: which samples the splits "train" and "val" hold.
        loader: makes the batches of both splits.
        folder: the run's folder; None on the ranks other than 0, which write nothing.
        writer: writes checkpoints; None on the ranks other than 0.
        interrupt: remembers a signal that asked this rank to stop.
        row: counts since the last training row.
        progress: the run's history, which is the same on all ranks.
        step: optimiser steps finished.
        skipped: steps that the guard had skipped at the last row.
        evaluated: whether there are validation metrics of this step.
        started: when this start of the run began to train, in seconds of the monotonic clock.
        ended: why no step is to follow; None while there is one.
        held_up_s: for how long training has waited for checkpoints, in seconds.
    """

    config: RunConfig
    parts: StepParts
    train_step: StepFn
    train_set: Dataset
    val_set: Dataset
    data: dict[str, Contents]
    loader: Loader
    folder: RunFolder | None
    writer: AsyncCheckpointWriter | None
    metrics_log: MetricsLog
    abort: AbortPolicy
    interrupt: Interrupt
    steps_per_epoch: int
    row: RunningMetrics
    progress: Progress
    step: int
    skipped: int
    evaluated: bool
    started: float = field(default_factory=time.monotonic)
    ended: str | None = None
    held_up_s: float = 0.0

    @property
    def position(self) -> int:
        """Optimiser steps that the finished epochs, and this one so far, take with the batch of now."""
        return self.step - self.progress.step_offset

    @property
    def ends_epoch(self) -> bool:
        """Whether the last step was the last of an epoch."""
        return self.position > 0 and self.position % self.steps_per_epoch == 0

    @property
    def seconds(self) -> float:
        """Time of training, by this rank's clock; without that between a stop and a resume."""
        return self.progress.seconds + time.monotonic() - self.started

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the whole run."""
        return self.config.epochs * self.steps_per_epoch + self.progress.step_offset

    @property
    def course(self) -> Course:
        """Properties that the choice of a step depends on."""
        return Course(
            num_images=self.config.epochs * len(self.train_set),
            rate=base_lr_for(self.config.schedule, self.config.global_batch),
            step=self.step,
            folder=self.folder.path if self.folder is not None else None,
        )


@torch.no_grad()
def take_snapshot(run: RunState, metrics: Metrics | None) -> Snapshot | None:
    """Copy the state at the current step; training may continue as soon as this returns.

    Every rank must call this. The writer must be idle: it reads the memory that is copied to.

    Args:
        metrics: of the validation split at this step; None where it was not evaluated.
    Returns:
        On rank 0 the snapshot; on the others None.
    """
    parts, parallel, optimizer = run.parts, run.parts.parallel, run.parts.optimizer
    states = {  # unsharded, and views: nothing is copied yet
        "model": gather_tensors(parallel, parts.network.state_dict()),
        "average": gather_tensors(parallel, parts.ema.values if parts.ema is not None else {}),
        "optimizer": map_optimizer_state(parallel, optimizer, optimizer.state_dict(), gather_tensors),
        "scaler": parts.scaler.state_dict(),
        "guard": parts.guard.state_dict(),
        "row": run.row.state_dict(run.skipped),
    }
    if run.writer is None:
        return None
    figures = {} if metrics is None else {name: getattr(metrics, name) for name in ("loss", "top1", "top5")}
    return Snapshot(
        step=run.step,
        epoch=run.position // run.steps_per_epoch,
        samples_seen=run.step * run.config.global_batch + run.progress.samples_offset,
        config=run.config,
        classes=run.train_set.classes,
        labels_text=run.train_set.labels_text,
        data=run.data,
        metrics={name: value for name, value in figures.items() if math.isfinite(value)},
        progress=msgspec.structs.replace(run.progress, seconds=run.seconds),
        states=run.writer.staging.copy(states),
    )
