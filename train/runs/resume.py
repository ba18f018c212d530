"""Resuming: which run and checkpoint a start continues, and how a run is brought back to a step.

Ranks that torchrun restarts (`--max-restarts`) resume the run that they began: runs/<run>/launch.json names
the torchrun that works on a run, and the error that ended it, if another try would end with the same.
"""

from __future__ import annotations

import glob
import logging
from dataclasses import dataclass
from pathlib import Path

import msgspec

from data_pipeline.common.errors import (
    CorruptFileError,
    DivergedError,
    InterruptedRunError,
    SaveError,
    UserError,
)
from data_pipeline.common.files import read_small
from data_pipeline.common.text import printable
from data_pipeline.datasets.dataset import Contents
from train.checkpoints.format import Pointer, read_manifest, write_pointer
from train.checkpoints.load import Checkpoint, find_best, find_checkpoint, find_newest_intact
from train.checkpoints.retention import remove_leftovers, restore_replaced, saved_steps, supersede_after
from train.config.load import decode_config
from train.config.schema import RunConfig
from train.distributed.torchrun import Launch
from train.runs.changes import check_fixed
from train.runs.folder import RunFolder, save_json

log = logging.getLogger("train")

FILE = "launch.json"


class Ended(msgspec.Struct, frozen=True, kw_only=True):
    """The error that ended a run for good: exit code of `InterruptedRunError` or `DivergedError`, message."""

    exit_code: int
    message: str


class LaunchRecord(msgspec.Struct, frozen=True, kw_only=True):
    """`launch.json`, see `train.distributed.torchrun.Launch`."""

    run_id: str
    launcher: str
    ended: Ended | None = None


@dataclass(frozen=True)
class Start:
    """The start of a run.

    Attributes:
        run: its folder; None to make a new one.
        checkpoint: the step's folder to resume from; None to begin at step 0.
    """

    run: Path | None
    checkpoint: Path | None


def choose_start(out: Path | None, resume: str, config: RunConfig, launch: Launch | None) -> Start:
    """Choose where to begin: restarted ranks resume their own run, whatever `resume` is.

    Args:
        out, resume, config: see `find_resumable`; `out` is None for steps that leave no files.
        launch: None outside torchrun.
    Raises:
        InterruptedRunError, DivergedError: the error that ended this launch's run; it is not tried again.
        UserError, CorruptFileError: from `find_resumable` and `find_newest_intact`.
    """
    if out is None:
        return Start(None, None)
    run = find_own_run(out, config, launch) if launch is not None else None
    if run is None:
        checkpoint = find_resumable(out, resume, config)
        return Start(checkpoint.parent.parent if checkpoint is not None else None, checkpoint)
    restore_replaced(run / "checkpoints")
    saved = saved_steps(run / "checkpoints")
    log.info(
        f"the ranks were started again: going on with {run}{'' if saved else ', which has no checkpoint yet'}"
    )
    return Start(run, find_newest_intact(run) if saved else None)


def find_own_run(out: Path, config: RunConfig, launch: Launch) -> Path | None:
    """Find the newest run that this very launch worked on before; None on its first attempt.

    Raises:
        InterruptedRunError, DivergedError: the error that ended that run.
    """
    records = out.glob(f"{glob.escape(config.recipe)}-*/{FILE}")
    for path in sorted(records, key=lambda path: path.parent.name, reverse=True):
        try:
            record = msgspec.json.decode(read_small(path), type=LaunchRecord)
        except (OSError, CorruptFileError, msgspec.DecodeError, UnicodeDecodeError) as error:
            log.warning(f"{path} cannot be read, and is passed over: {error}")
            continue
        # Rank 0 may have moved to another machine; the launch's name, if it has one, is the same there.
        moved = launch.restarts > 0 and launch.run_id not in ("", "none") and launch.run_id == record.run_id
        if launch.launcher != record.launcher and not moved:
            continue
        if record.ended is None:
            return path.parent
        interrupted = record.ended.exit_code == InterruptedRunError.exit_code
        raise (InterruptedRunError if interrupted else DivergedError)(record.ended.message)
    return None


def claim_run(folder: RunFolder, launch: Launch | None, ended: Ended | None = None) -> None:
    """Record that this launch works on the run.

    Args:
        ended: by which error it does not any more.
    Raises:
        SaveError: the disk is full, or cannot be written to.
    """
    if launch is not None:
        record = LaunchRecord(run_id=launch.run_id, launcher=launch.launcher, ended=ended)
        save_json(folder.path / FILE, record)


def end_run(folder: RunFolder, launch: Launch | None, error: InterruptedRunError | DivergedError) -> None:
    """Record that the run ended, so that a restart of the ranks does not try again."""
    try:
        claim_run(folder, launch, Ended(exit_code=error.exit_code, message=str(error)))
    except SaveError as failure:
        log.error(f"{failure}: a restart will try again")


def find_resumable(out: Path, resume: str, config: RunConfig) -> Path | None:
    """Find the checkpoint to resume from.

    Args:
        out: folder of runs.
        resume: `none`, `auto` (the newest intact checkpoint of the newest run of this recipe), or the path
            of a run or a checkpoint.
        config: the configuration of the run to start, which must be the earlier run's but for what a resumed
            run may change.
    Returns:
        A step's folder; None to start a new run.
    Raises:
        UserError: nothing at that path, or a run whose configuration differs, with the keys that do.
    """
    if resume == "none":
        return None
    if resume != "auto":
        folder = Path(resume)
        restore_replaced(folder / "checkpoints")
        # Not by the run's pointers: a crash can leave them behind its newest checkpoint.
        is_run = bool(saved_steps(folder / "checkpoints"))
        folder = find_newest_intact(folder) if is_run else find_checkpoint(folder)
        if folder.parent.name != "checkpoints":
            raise UserError(
                f"{folder} does not lie in a run's checkpoints/, so there is no run to go on with; "
                "name a run, or a checkpoint inside one"
            )
        read_manifest(folder)
        run = folder.parent.parent
        check_fixed(config, _read_config(run), run)
        return folder
    for run in sorted(out.glob(f"{glob.escape(config.recipe)}-*"), key=lambda run: run.name, reverse=True):
        folder = run / "checkpoints"
        restore_replaced(folder)
        begun = saved_steps(folder) or (folder / "last.json").exists()
        if begun and (earlier := _read_config(run)).recipe == config.recipe:
            check_fixed(config, earlier, run)
            return find_newest_intact(run)
    log.info(
        f"--resume auto: no run of recipe {config.recipe} under {out}/ has a checkpoint; starting a new one"
    )
    return None


def check_same_data(checkpoint: Checkpoint, data: dict[str, Contents], root: Path) -> None:
    """Refuse to resume on other training images: a position in the stream would mean another sample.

    Other validation images are logged: metrics before and after are not comparable.

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
                "list, name where they are with --data DIR, or start a new run with --resume none"
            )
        log.warning(f"{what}: metrics before and after this point do not compare")


def _count(contents: Contents) -> str:
    return f"{contents.num_samples} and {contents.num_quarantined} in quarantine"


def rewind(folder: RunFolder, step: int) -> Pointer | None:
    """Bring a run back to a step: hide later checkpoints, drop later rows, and correct the pointers.

    In this order: a kill in between must not leave rows missing for a checkpoint that would be resumed.

    Returns:
        The best checkpoint up to there.
    Raises:
        SaveError: the disk does not allow it.
    """
    try:
        superseded = supersede_after(folder.checkpoints, step)
        dropped = folder.drop_rows_after(step)
        remove_leftovers(folder.checkpoints)
        best = find_best(folder.checkpoints, step)
        if best is None:
            (folder.checkpoints / "best.json").unlink(missing_ok=True)
        else:
            write_pointer(folder.checkpoints, "best", best)
    except OSError as error:
        raise SaveError(f"{folder.path} cannot be resumed: {error.filename}: {error.strerror}") from error
    if superseded:
        log.info(
            f"{len(superseded)} checkpoint(s) after step {step} are set aside until the next one is written"
        )
    log.info(f"resuming at step {step}; {dropped} later row(s) of metrics.jsonl dropped")
    return best


def _read_config(run: Path) -> RunConfig:
    path = run / "config.json"
    try:
        return decode_config(msgspec.json.decode(read_small(path)))
    except OSError as error:
        raise CorruptFileError(f"run {run} has no readable config.json: {error.strerror}") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise CorruptFileError(f"{path} is damaged: {error}") from error
