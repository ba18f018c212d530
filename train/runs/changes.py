"""The changes of configuration that a resumed run may make, and the rate at which it continues.

docs/checkpoints.md has the table: what is free to change, what takes --allow-changed-schedule, what is fixed.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from data_pipeline.common.errors import UserError
from data_pipeline.transforms.sampler import steps_per_epoch
from train.checkpoints.format import Change, Progress
from train.checkpoints.load import Checkpoint
from train.config.schema import DECIDE_THE_SCHEDULE, FREE_TO_CHANGE, RunConfig
from train.optim.schedule import base_lr_for, lr_at, plateau_drops

log = logging.getLogger("train")

FLAG = "--allow-changed-schedule"


def check_fixed(wanted: RunConfig, earlier: RunConfig, run: Path) -> None:
    """Refuse another value of a key that decides what a run computes.

    Raises:
        UserError: with the keys and both values.
    """
    changeable = {*FREE_TO_CHANGE, *DECIDE_THE_SCHEDULE}
    fixed = (name for name in RunConfig.__struct_fields__ if name not in changeable)
    differing = _differences(earlier, wanted, fixed)
    # Of where the data is, this alone decides which samples a step has.
    if earlier.data.balance != wanted.data.balance:
        differing.append(f"data.balance was {earlier.data.balance!r}, now {wanted.data.balance!r}")
    if differing:
        raise UserError(
            f"cannot resume {run} with another configuration ({'; '.join(differing)}); "
            "use the same recipe and --set, or start a new run with --resume none"
        )


def apply_changes(config: RunConfig, checkpoint: Checkpoint, num_samples: int, *, allowed: bool) -> Progress:
    """Compare the schedule with that of a checkpoint, log how it goes on, and record what changed.

    Earlier epochs count as if the schedule had been this one from the start.

    Args:
        config: of the run that goes on.
        num_samples: size of the training set.
        allowed: whether learning rates and the batch may change.
    Returns:
        The checkpoint's progress, with the change.
    Raises:
        UserError: a change that needs the flag, or another batch inside an epoch.
    """
    earlier, step = checkpoint.config, checkpoint.step
    differing = _differences(earlier, config, DECIDE_THE_SCHEDULE)
    if not differing:
        return checkpoint.progress
    what = "; ".join(differing)
    progress = checkpoint.progress
    if earlier.global_batch != config.global_batch:
        progress = _count_in_batches_of(config, checkpoint, num_samples)
    rate = rate_at(step, config, progress, num_samples)
    groups = checkpoint.states["optimizer"].get("param_groups")
    last = f" (the last step had {groups[0]['lr']:g})" if groups else ""
    goes_on = f"at a learning rate of {rate:g}{last}"
    if _keeps_every_rate(earlier, config):
        log.info(f"{what}, which changes no learning rate: it goes on {goes_on}")
    elif not allowed:
        raise UserError(
            f"cannot resume {checkpoint.run_folder} as it was: {what}, which changes the learning rates or "
            f"batches of later steps: it would go on {goes_on}. Add {FLAG} to do so, or start a new run "
            "with --resume none"
        )
    else:
        log.info(f"{what}, which changes later steps ({FLAG}): it goes on {goes_on}")
    change = Change(step=step, what=tuple(differing))
    return msgspec.structs.replace(progress, changes=(*progress.changes, change))


def rate_at(step: int, config: RunConfig, progress: Progress, num_samples: int) -> float:
    """Return the learning rate of the step after `step` steps; at the end of a run, that of one more."""
    num_steps = steps_per_epoch(num_samples, config.global_batch)
    total_steps = config.epochs * num_steps
    base_lr = base_lr_for(config.schedule, config.global_batch)
    return lr_at(
        min(step - progress.step_offset, total_steps),
        msgspec.structs.replace(config.schedule, learning_rate=base_lr),
        steps_per_epoch=num_steps,
        total_steps=total_steps,
        drops=plateau_drops(progress.val_errors, config.schedule),
    )


def _count_in_batches_of(config: RunConfig, checkpoint: Checkpoint, num_samples: int) -> Progress:
    """Return the progress with which steps of another batch go on where an epoch starts.

    Raises:
        UserError: inside an epoch, where the samples that are left are no whole number of such batches.
    """
    before, step = checkpoint.progress, checkpoint.step
    epoch, inside = divmod(
        step - before.step_offset, steps_per_epoch(num_samples, checkpoint.config.global_batch)
    )
    if inside:
        was, now = checkpoint.config.global_batch, config.global_batch
        raise UserError(
            f"cannot resume: global_batch was {was}, now {now}, which can change where an epoch starts, and "
            f"{checkpoint.folder} is inside epoch {epoch + 1}; name a checkpoint of the end of an epoch with "
            "--resume, or keep the batch"
        )
    return msgspec.structs.replace(
        before,
        step_offset=step - epoch * steps_per_epoch(num_samples, config.global_batch),
        samples_offset=checkpoint.samples_seen - step * config.global_batch,
    )


def _keeps_every_rate(earlier: RunConfig, config: RunConfig) -> bool:
    """Whether only the number of epochs differs, and the rate does not depend on it."""
    same = (earlier.schedule, earlier.global_batch) == (config.schedule, config.global_batch)
    return same and config.schedule.kind not in ("cosine", "poly")


def _differences(earlier: RunConfig, wanted: RunConfig, names: Iterable[str]) -> list[str]:
    """List the keys, of some fields of the configuration and what is inside, whose values differ."""
    before, now = msgspec.to_builtins(earlier), msgspec.to_builtins(wanted)
    differing = (found for name in names for found in differing_values(name, before[name], now[name]))
    return [f"{key} was {old!r}, now {new!r}" for key, old, new in differing]


def differing_values(key: str, old: Any, new: Any) -> Iterator[tuple[str, Any, Any]]:
    """Yield the dotted keys, of a value and what is inside, whose old and new values differ, with both."""
    if isinstance(old, dict):
        for inner in old:
            yield from differing_values(f"{key}.{inner}", old[inner], new[inner])
    elif old != new:
        yield key, old, new
