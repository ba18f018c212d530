"""The state of a run, as a checkpoint holds it: taken on all ranks together, copied on rank 0."""

from __future__ import annotations

import math
from typing import Any

import torch

from train.checkpoints.background import copied
from train.checkpoints.write import State
from train.distributed.hybrid import gather_optimizer_state, gather_tensors
from train.health.metrics import Metrics
from train.setup import RunState
from train.step import TrainStep


@torch.no_grad()
def gather_state(trainer: TrainStep) -> dict[str, dict[str, Any]]:
    """The whole state of each of `train.checkpoints.load.PARTS`, wherever it is now.

    Every rank calls this at the same step, so that what is split over the ranks can be put together here;
    rank 0's answer is the one that counts. Nothing is copied yet.
    """
    average = trainer.average.values if trainer.average is not None else {}
    return {
        "model": gather_tensors(trainer.parallel, trainer.network.state_dict()),
        "average": gather_tensors(trainer.parallel, average),
        "optimizer": gather_optimizer_state(trainer.parallel, trainer.optimizer),
        "scaler": trainer.scaler.state_dict(),
        "guard": trainer.guard.state_dict(),
    }


def snapshot(run_state: RunState, metrics: Metrics | None) -> State | None:
    """Copy what a checkpoint of the present step holds; training may go on as soon as this returns.

    Every rank calls this. The saver must not be writing: it reads the memory that is copied to.

    Args:
        metrics: of the validation split at this step; None inside an epoch.
    Returns:
        On rank 0 the state; on the others None.
    """
    parts = gather_state(run_state.trainer) | {"row": run_state.row.state_dict(run_state.skipped)}
    if run_state.saver is None:
        return None
    figures = {}
    if metrics is not None:
        figures = {"loss": metrics.loss, "top1": metrics.top1, "top5": metrics.top5}
    return State(
        step=run_state.step,
        epoch=run_state.step // run_state.steps_per_epoch,
        samples_seen=run_state.step * run_state.config.global_batch,
        config=run_state.config,
        classes=run_state.train_set.classes,
        labels_text=run_state.train_set.labels_text,
        data=run_state.data,
        metrics={name: value for name, value in figures.items() if math.isfinite(value)},
        progress=run_state.progress,
        parts=run_state.saver.copies.take(parts),
        wait_until_copied=copied(run_state.trainer.world.device),
    )
