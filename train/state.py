"""The state of a run, as a checkpoint holds it: taken on all ranks together, copied on rank 0."""

from __future__ import annotations

import math
from typing import Any

import torch

from train.checkpoints.background import copied
from train.checkpoints.write import State
from train.distributed.hybrid import whole_optimizer_state, whole_tensors
from train.health.metrics import Metrics
from train.setup import Session
from train.step import Trainer


@torch.no_grad()
def gather_parts(trainer: Trainer) -> dict[str, dict[str, Any]]:
    """The whole state of each of `train.checkpoints.load.PARTS`, wherever it is now.

    Every rank calls this at the same step, so that what is split over the ranks can be put together here;
    rank 0's answer is the one that counts. Nothing is copied yet.
    """
    average = trainer.average.values if trainer.average is not None else {}
    return {
        "model": whole_tensors(trainer.parallel, trainer.network.state_dict()),
        "average": whole_tensors(trainer.parallel, average),
        "optimizer": whole_optimizer_state(trainer.parallel, trainer.optimizer),
        "scaler": trainer.scaler.state_dict(),
        "guard": trainer.guard.state_dict(),
    }


def snapshot(session: Session, metrics: Metrics | None) -> State | None:
    """Copy what a checkpoint of the present step holds; training may go on as soon as this returns.

    Every rank calls this. The saver must not be writing: it reads the memory that is copied to.

    Args:
        metrics: of the validation split at this step; None inside an epoch.
    Returns:
        On rank 0 the state; on the others None.
    """
    parts = gather_parts(session.trainer) | {"row": session.row.state_dict(session.skipped)}
    if session.saver is None:
        return None
    figures = {}
    if metrics is not None:
        figures = {"loss": metrics.loss, "top1": metrics.top1, "top5": metrics.top5}
    return State(
        step=session.step,
        epoch=session.step // session.steps_per_epoch,
        samples_seen=session.step * session.config.global_batch,
        config=session.config,
        classes=session.train_set.classes,
        labels_text=session.train_set.labels_text,
        data=session.data,
        metrics={name: value for name, value in figures.items() if math.isfinite(value)},
        progress=session.progress,
        parts=session.saver.copies.take(parts),
        wait_until_copied=copied(session.trainer.world.device),
    )
