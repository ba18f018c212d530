"""Which checkpoints of a run stay: the last few, the best, every so many steps. None is half removed."""

from __future__ import annotations

import shutil
from collections.abc import Collection
from pathlib import Path

WRITING, REMOVING, SET_ASIDE, REPLACED = ".writing-", ".removing-", ".aside-", ".replaced-"
"""Names of what is no checkpoint yet, is none any more, lies behind the step that a run went back to, or
makes room for another one of the same step."""


def step_folder(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step stands in a run's `checkpoints/`."""
    return folder / f"step-{step:08d}"


def saved_steps(folder: Path) -> dict[int, Path]:
    """The checkpoints in a run's `checkpoints/` by step, ascending; whether they are whole is not asked."""
    found = {p.name[len("step-") :]: p for p in folder.glob("step-*") if p.is_dir()}
    return dict(sorted((int(step), path) for step, path in found.items() if step.isdecimal()))


def steps_to_keep(
    steps: Collection[int], *, keep_last: int, keep_every: int | None, best: int | None
) -> set[int]:
    """Which checkpoints stay.

    Args:
        steps: of the checkpoints that there are.
        keep_last: so many of the newest, at least 1.
        keep_every: and the first one at or after each multiple of so many steps; None for no such.
        best: and this one.

    >>> sorted(steps_to_keep([5, 10, 12, 15, 20, 24], keep_last=1, keep_every=10, best=5))
    [5, 10, 20, 24]
    """
    ascending = sorted(steps)
    keep = set(ascending[-keep_last:]) | {step for step in ascending if step == best}
    if keep_every is not None:
        first_of: dict[int, int] = {}
        for step in ascending:
            first_of.setdefault(step // keep_every, step)
        keep |= {step for multiple, step in first_of.items() if multiple > 0}
    return keep


def prune_checkpoints(folder: Path, *, keep_last: int, keep_every: int | None, best: int | None) -> None:
    """Remove what need not stay, and what was set aside. Called when a newer checkpoint is on the disk.

    Raises:
        OSError: something cannot be removed.
    """
    saved = saved_steps(folder)
    keep = steps_to_keep(saved, keep_last=keep_last, keep_every=keep_every, best=best)
    for step, path in saved.items():
        if step not in keep:
            path.rename(folder / f"{REMOVING}{path.name}")  # no kill leaves half a checkpoint under its name
    remove_leftovers(folder, aside=True)


def restore_replaced(folder: Path) -> None:
    """Bring back a checkpoint that a killed process had made room for, and not yet filled it."""
    for path in folder.glob(f"{REPLACED}*"):
        final = folder / path.name[len(REPLACED) :]
        if final.exists():
            shutil.rmtree(path)
        else:
            path.rename(final)


def remove_leftovers(folder: Path, *, aside: bool = False) -> None:
    """Remove what a killed process was writing or removing; with `aside` what was set aside, too."""
    restore_replaced(folder)
    for prefix in (WRITING, REMOVING, *([SET_ASIDE] if aside else [])):
        for path in folder.glob(f"{prefix}*"):
            shutil.rmtree(path)


def supersede_after(folder: Path, step: int) -> list[Path]:
    """Take the checkpoints behind a step out of the way of a run that goes on from there.

    They are damaged, or of a course that is given up: counted among the newest, they would push good ones
    out, and the next resume would take them for the run's. They stay until the next checkpoint is written.

    Returns:
        Where they were.
    """
    later = [path for saved, path in saved_steps(folder).items() if saved > step]
    for path in later:
        aside = folder / f"{SET_ASIDE}{path.name}"
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
    return later
