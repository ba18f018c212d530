"""When training only wastes time: what the guard counted is told, and ends the run where it must."""

from __future__ import annotations

import logging
from pathlib import Path

import msgspec
import torch

from data_pipeline.common.errors import DivergedError
from data_pipeline.common.files import write_json
from data_pipeline.common.text import printable
from data_pipeline.transforms.sampler import permutation_at, positions_at
from train.checkpoints.retention import saved_steps
from train.health.flat_loss import describe_flat, flat_level
from train.health.metrics import Metrics
from train.health.nonfinite import MIN_SCALE, all_finite
from train.setup import RunState

log = logging.getLogger("train")

NUM_SHOWN = 3
"""Paths that a message names; the file has all."""


def check_skipped_steps(run_state: RunState) -> int:
    """Tell which steps were skipped since the last call; all ranks call this, and all see the same counts.

    Returns:
        How many they were.
    Raises:
        DivergedError: `max_skipped` in a row, or float16's loss scale is down to nothing.
    """
    skips, scaler = run_state.trainer.guard.read(), run_state.trainer.scaler
    new, run_state.skipped = skips.total - run_state.skipped, skips.total
    limit = run_state.config.max_skipped
    if new and run_state.folder is not None:
        log.warning(
            f"{new} step(s) up to step {run_state.step} skipped on all ranks, {skips.in_row} in a row now "
            f"({limit} end the run): the gradient was not finite, or a spike; {skips.total} since the run "
            f"began, {skips.spikes} of them spikes"
        )
    if skips.in_row >= limit:
        raise DivergedError(
            f"{limit} steps in a row, from step {skips.first + 1} on, had a gradient that is not finite"
            f"{'' if run_state.config.spike_factor is None else ' or a spike'}; the weights are those of "
            f"step {skips.first}. {_evidence(run_state, skips.first, limit)}{_last_good(run_state)}"
            "Start anew with a lower schedule.learning_rate or a longer schedule.warmup_epochs"
        )
    if scaler.is_enabled() and (scale := scaler.get_scale()) < MIN_SCALE:
        raise DivergedError(
            f"float16's loss scale fell to {scale:g} by step {run_state.step}: gradients overflow without "
            f"any scaling. {_last_good(run_state)}Use precision=bf16 or fp32, or a lower "
            "schedule.learning_rate"
        )
    return new


def check_flat_loss(run_state: RunState, metrics: Metrics) -> None:
    """Watch the training loss since the last row; all ranks call this, and all see the same.

    Args:
        metrics: of the samples since the last row, over all ranks.
    Raises:
        DivergedError: it has sat at ln(classes) for `flat_loss_grace` steps.
    """
    config, labels, num_classes = (
        run_state.config,
        run_state.train_set.labels,
        len(run_state.train_set.classes),
    )
    if config.flat_loss_grace == 0:
        return
    level = flat_level(labels, num_classes, config.label_smoothing)
    flat = run_state.progress.flat_loss.after(run_state.step, metrics, level, config.flat_loss_grace)
    run_state.progress = msgspec.structs.replace(run_state.progress, flat_loss=flat)
    if flat.num_steps >= config.flat_loss_grace:
        said = describe_flat(level, num_classes, flat.num_steps, config)
        raise DivergedError(f"{said}. {_last_good(run_state)}".rstrip(". "))


def check_weights(run_state: RunState) -> None:
    """Let no weights that are not finite become a checkpoint, or push a good one out.

    Raises:
        DivergedError: a weight or a momentum is NaN or infinite on any rank; all raise it.
    """
    trainer = run_state.trainer
    momenta = [value for state in trainer.optimizer.state.values() for value in state.values()]
    held = [*trainer.network.state_dict().values(), *(m for m in momenta if isinstance(m, torch.Tensor))]
    if trainer.world.any(not all_finite(held)):
        raise DivergedError(
            f"the weights or their momentum are not finite at step {run_state.step}, which is not saved. "
            f"{_last_good(run_state)}Start anew with a lower schedule.learning_rate"
        )


def samples_at(run_state: RunState, step: int) -> list[str]:
    """Paths of the samples of one step, over all ranks; a function of the seed and the step alone."""
    config, dataset = run_state.config, run_state.train_set
    epoch, positions = positions_at(step, len(dataset), config.global_batch, 0, 1)
    indices = permutation_at(config.seed, epoch, len(dataset))[positions]
    return [printable(dataset.path_at(int(index))) for index in indices]


def _evidence(run_state: RunState, first: int, num_steps: int) -> str:
    """Write the samples of the steps to `diverged.json`, on rank 0, and name the first."""
    if run_state.folder is None:
        return ""
    steps = [{"step": s + 1, "samples": samples_at(run_state, s)} for s in range(first, first + num_steps)]
    path: Path = run_state.folder.path / "diverged.json"
    shown = ", ".join(samples_at(run_state, first)[:NUM_SHOWN])
    try:
        write_json(path, steps)
    except OSError as error:
        return f"Their samples begin with {shown}; {path} could not be written: {error.strerror}. "
    return f"Their samples, {shown} and so on, are in {path}. "


def _last_good(run_state: RunState) -> str:
    """The newest checkpoint, as part of a message; one that is being written is waited for."""
    if run_state.folder is None or run_state.saver is None:
        return ""
    run_state.saver.wait()
    saved = list(saved_steps(run_state.folder.checkpoints).values())
    return f"The last good checkpoint is {saved[-1]}. " if saved else "There is no checkpoint yet. "
