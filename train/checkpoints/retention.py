"""Keeps a run's checkpoints: the last few, the best, every so many steps. None is half removed."""

from __future__ import annotations

import shutil
from collections.abc import Collection
from pathlib import Path

from train.config.schema import RunConfig

WRITING = ".writing-"
"""Prefix of a checkpoint that is not finished."""
REMOVING = ".removing-"
"""Prefix of a checkpoint that is being removed."""
SUPERSEDED = ".aside-"
"""Prefix of a checkpoint newer than the step resumed from; removed after the next save."""
REPLACED = ".replaced-"
"""Prefix of a checkpoint that makes room for another one of the same step."""


def step_folder(folder: Path, step: int) -> Path:
    """Return the folder of a step's checkpoint in a run's `checkpoints/`."""
    return folder / f"step-{step:08d}"


def saved_steps(folder: Path) -> dict[int, Path]:
    """Return the checkpoints in a run's `checkpoints/` by step, ascending, without verifying them."""
    found = {p.name[len("step-") :]: p for p in folder.glob("step-*") if p.is_dir()}
    return dict(sorted((int(step), path) for step, path in found.items() if step.isdecimal()))


def steps_to_keep(
    steps: Collection[int], *, keep_last: int, keep_every: int | None, best: int | None
) -> set[int]:
    """Choose the checkpoints that stay.

    Args:
        steps: of the existing checkpoints.
        keep_last: how many of the newest stay, at least 1.
        keep_every: the first one at or after each multiple of so many steps stays; None for no such.
        best: this one stays.

    >>> sorted(steps_to_keep([5, 10, 12, 15, 20, 24], keep_last=1, keep_every=10, best=5))
    [5, 10, 20, 24]
    """
    ascending = sorted(steps)
    keep = set(ascending[-keep_last:]) | {step for step in ascending if step == best}
    if keep_every is not None:
        first_of = {step // keep_every: step for step in reversed(ascending)}
        keep |= {step for multiple, step in first_of.items() if multiple > 0}
    return keep


def prune_checkpoints(folder: Path, config: RunConfig, best: int | None) -> None:
    """Remove checkpoints that need not stay, and superseded ones. Call it when a newer one is on the disk.

    Args:
        config: of the run, which says how many stay.
        best: see `steps_to_keep`.
    Raises:
        OSError: something cannot be removed.
    """
    saved = saved_steps(folder)
    keep = steps_to_keep(saved, keep_last=config.keep_checkpoints, keep_every=config.keep_every, best=best)
    for step, path in saved.items():
        if step not in keep:
            path.rename(folder / f"{REMOVING}{path.name}")  # a kill must not leave half a checkpoint
    remove_leftovers(folder, superseded=True)


def restore_replaced(folder: Path) -> None:
    """Bring back a checkpoint that a killed process had moved to make room, before the new one was there."""
    for path in folder.glob(f"{REPLACED}*"):
        final = folder / path.name[len(REPLACED) :]
        if final.exists():
            shutil.rmtree(path)
        else:
            path.rename(final)


def remove_leftovers(folder: Path, *, superseded: bool = False) -> None:
    """Remove what a killed process was writing or removing, and on request superseded checkpoints."""
    restore_replaced(folder)
    for prefix in (WRITING, REMOVING, *([SUPERSEDED] if superseded else [])):
        for path in folder.glob(f"{prefix}*"):
            shutil.rmtree(path)


def supersede_after(folder: Path, step: int) -> list[Path]:
    """Hide the checkpoints after a step from a run that resumes there.

    They are damaged, or of a course that is given up: counted among the newest, they would displace good
    ones, and the next resume would take them for the run's. They stay until the next checkpoint is written.

    Returns:
        Where they were.
    """
    later = [path for saved, path in saved_steps(folder).items() if saved > step]
    for path in later:
        hidden = folder / f"{SUPERSEDED}{path.name}"
        shutil.rmtree(hidden, ignore_errors=True)
        path.rename(hidden)
    return later
