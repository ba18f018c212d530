"""Ranks that torchrun started again (`--max-restarts`) go on with the run that they began.

runs/<run>/launch.json says which torchrun works on a run, and how the run ended where a further try would
end alike.
"""

from __future__ import annotations

import glob
import logging
from dataclasses import dataclass
from pathlib import Path

import msgspec

from data_pipeline.common.errors import CorruptFileError, DivergedError, InterruptedRunError, SaveError
from data_pipeline.common.files import read_small, write_json
from train.checkpoints.retention import restore_replaced, saved_steps
from train.config.load import RunConfig
from train.distributed.world import Launch
from train.runs.folder import RunFolder, find_resumable, newest_whole

log = logging.getLogger("train")

FILE = "launch.json"


class Ended(msgspec.Struct, frozen=True, kw_only=True):
    """How a run ended for good: with the exit code of `InterruptedRunError` or `DivergedError`."""

    exit_code: int
    message: str


class LaunchRecord(msgspec.Struct, frozen=True, kw_only=True):
    """See `train.distributed.world.Launch`."""

    run_id: str
    launcher: str
    ended: Ended | None = None


@dataclass(frozen=True)
class Start:
    """Where a run begins.

    Args:
        run: its folder; None to make a new one.
        checkpoint: the step's folder to go on from; None to begin at step 0.
    """

    run: Path | None
    checkpoint: Path | None


def choose_start(out: Path, resume: str, config: RunConfig, launch: Launch | None) -> Start:
    """Where to begin: a launch that restarted its ranks goes on with its own run, whatever `resume` says.

    Args:
        out, resume, config: see `train.runs.folder.find_resumable`.
        launch: None outside torchrun.
    Raises:
        InterruptedRunError, DivergedError: as that run ended before; it is not tried again.
        UserError, CorruptFileError: from `find_resumable` and `newest_whole`.
    """
    run = find_own_run(out, config, launch) if launch is not None else None
    if run is None:
        checkpoint = find_resumable(out, resume, config)
        return Start(checkpoint.parent.parent if checkpoint is not None else None, checkpoint)
    restore_replaced(run / "checkpoints")
    saved = saved_steps(run / "checkpoints")
    log.info(
        f"the ranks were started again: going on with {run}{'' if saved else ', which has no checkpoint yet'}"
    )
    return Start(run, newest_whole(run) if saved else None)


def find_own_run(out: Path, config: RunConfig, launch: Launch) -> Path | None:
    """The newest run that this very launch worked on before; None on its first attempt.

    Raises:
        InterruptedRunError, DivergedError: as that run ended.
    """
    for path in sorted(
        out.glob(f"{glob.escape(config.recipe)}-*/{FILE}"), key=lambda p: p.parent.name, reverse=True
    ):
        try:
            record = msgspec.json.decode(read_small(path), type=LaunchRecord)
        except (OSError, CorruptFileError, msgspec.DecodeError, UnicodeDecodeError) as error:
            log.warning(f"{path} cannot be read, and is passed over: {error}")
            continue
        # Rank 0 may have moved to another machine; the name of a launch, where it has one, moves with it.
        moved = launch.restarts > 0 and launch.run_id not in ("", "none") and launch.run_id == record.run_id
        if launch.launcher != record.launcher and not moved:
            continue
        if record.ended is None:
            return path.parent
        kind = (
            InterruptedRunError if record.ended.exit_code == InterruptedRunError.exit_code else DivergedError
        )
        raise kind(record.ended.message)
    return None


def claim_run(folder: RunFolder, launch: Launch | None) -> None:
    """Write down that this launch works on the run.

    Raises:
        SaveError: the disk is full, or cannot be written to.
    """
    if launch is None:
        return
    try:
        write_json(folder.path / FILE, LaunchRecord(run_id=launch.run_id, launcher=launch.launcher))
    except OSError as error:
        raise SaveError(f"{folder.path / FILE} could not be written: {error.strerror}") from error


def end_run(folder: RunFolder, launch: Launch | None, error: InterruptedRunError | DivergedError) -> None:
    """Write down that the run ended, so that a restart of the ranks does not try again."""
    if launch is None:
        return
    ended = Ended(exit_code=error.exit_code, message=str(error))
    try:
        write_json(
            folder.path / FILE, LaunchRecord(run_id=launch.run_id, launcher=launch.launcher, ended=ended)
        )
    except OSError as failure:
        log.error(f"{folder.path / FILE} could not be written ({failure.strerror}): a restart will try again")
