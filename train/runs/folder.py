"""The run folder: configuration, metric rows, TensorBoard, and what `--resume` picks up."""

from __future__ import annotations

import glob
import logging
import os
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec

from data_pipeline.common.errors import CorruptFileError, SaveError, UserError
from data_pipeline.common.files import RetryingAppendFile, fsync_path, read_small, write_atomic, write_json
from train.checkpoints.load import Pointer, find_checkpoint, read_manifest, verify_checkpoint
from train.checkpoints.retention import remove_leftovers, restore_replaced, saved_steps, supersede_after
from train.config.load import RunConfig, decode_config

log = logging.getLogger("train")

FREE_TO_CHANGE = (
    "data", "device", "cpu_threads", "micro_batch", "timeout_s", "log_every", "keep_checkpoints",
    "keep_every", "max_skipped", "flat_loss_grace", "log_noise_scale", "parallel",
)  # fmt: skip
"""Keys that a resumed run may set anew: where it computes, not what. All others decide the result."""


class MetricsRow(msgspec.Struct, frozen=True, kw_only=True):
    """One line of `metrics.jsonl`. `top1` and `top5` are fractions; `images_per_s` is over all ranks.

    `skipped` steps changed nothing, and their samples count nowhere. What is not finite is null.
    With `log_noise_scale`, training rows have `grad_square` and `grad_trace`, estimates of |G|² and tr(S)
    over the row's steps, and `noise_scale`, the ratio of their running sums, in samples.
    """

    split: str
    epoch: int
    step: int
    samples: int
    failed: int
    skipped: int = 0
    loss: float | None
    top1: float | None
    top5: float | None
    lr: float
    images_per_s: float
    time: float
    grad_square: float | msgspec.UnsetType | None = msgspec.UNSET
    grad_trace: float | msgspec.UnsetType | None = msgspec.UNSET
    noise_scale: float | msgspec.UnsetType | None = msgspec.UNSET


@dataclass(frozen=True)
class RunFolder:
    """Paths inside `runs/<recipe>-<utc time>/`."""

    path: Path

    @property
    def metrics(self) -> Path:
        """One JSON row per event."""
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        """Step folders and the pointers `best.json` and `last.json`."""
        return self.path / "checkpoints"

    def point(self, name: str, pointer: Pointer) -> None:
        """Make `best` or `last` name a step."""
        write_json(self.checkpoints / f"{name}.json", pointer)

    def append(self, row: MetricsRow) -> OSError | None:
        """Add a row to `metrics.jsonl`.

        Returns:
            Why it, and what was kept before, is not in the file yet, if so.
        """
        return self._rows_file.append(msgspec.json.encode(row) + b"\n")

    def sync_rows(self) -> None:
        """Return when all rows so far are on the disk: a checkpoint that knows of them may follow.

        Raises:
            SaveError: the disk does not take them; they are kept.
        """
        try:
            self._rows_file.sync()
        except OSError as error:
            raise SaveError(f"the rows of {self.metrics} could not be written: {error.strerror}") from error

    @cached_property
    def _rows_file(self) -> RetryingAppendFile:
        return RetryingAppendFile(self.metrics)

    def rows(self) -> list[MetricsRow]:
        """The rows so far, in order; not half a line at the end."""
        lines = self.metrics.read_bytes().splitlines(keepends=True) if self.metrics.exists() else []
        return [row for line in lines if (row := _row(line)) is not None]

    def drop_rows_after(self, step: int) -> int:
        """Forget the rows of steps that a resumed run will do again, and half a line at the end.

        Returns:
            How many lines were dropped.
        """
        if not self.metrics.exists():
            return 0
        content = self.metrics.read_bytes()
        lines = content.splitlines(keepends=True)
        kept = b"".join(line for line in lines if (row := _row(line)) is not None and row.step <= step)
        if content.startswith(kept):  # cutting needs no room on the disk
            os.truncate(self.metrics, len(kept))
            fsync_path(self.metrics)
        else:
            write_atomic(self.metrics, kept)
        return len(lines) - kept.count(b"\n")


def _row(line: bytes) -> MetricsRow | None:
    try:
        return msgspec.json.decode(line, type=MetricsRow) if line.endswith(b"\n") else None
    except msgspec.DecodeError:
        return None


def create_run(out: Path, config: RunConfig) -> RunFolder:
    """Make a new run folder under `out`, named by recipe and time, with `config.json` in it."""
    name = f"{config.recipe}-{datetime.now(timezone.utc):%Y%m%dT%H%M%SZ}"
    for suffix in ("", *(f"-{n}" for n in range(2, 1000))):
        path = out / f"{name}{suffix}"
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            continue
        write_json(path / "config.json", config)
        (path / "checkpoints").mkdir()
        fsync_path(path)
        fsync_path(out)
        return RunFolder(path)
    raise UserError(f"{out} holds a thousand runs of this second")


def find_resumable(out: Path, resume: str, config: RunConfig) -> Path | None:
    """The checkpoint to go on from.

    Args:
        out: where runs live.
        resume: `none`, `auto` (the newest whole checkpoint of the newest run of this recipe), or the path of
            a run or a checkpoint.
        config: the configuration of the run to start, which the earlier run's must equal.
    Returns:
        A step's folder; None to start anew.
    Raises:
        UserError: nothing at that path, or a run whose configuration differs, with the keys that do.
    """
    if resume == "none":
        return None
    if resume != "auto":
        folder = Path(resume)
        restore_replaced(folder / "checkpoints")
        # Of a run, whatever its pointers say, the newest whole one: a crash can leave them behind.
        folder = newest_whole(folder) if saved_steps(folder / "checkpoints") else find_checkpoint(folder)
        if folder.parent.name != "checkpoints":
            raise UserError(
                f"{folder} does not lie in a run's checkpoints/, so there is no run to go on with; "
                "name a run, or a checkpoint inside one"
            )
        read_manifest(folder)
        _check_same(config, _run_config(folder.parent.parent), folder.parent.parent)
        return folder
    for run in sorted(out.glob(f"{glob.escape(config.recipe)}-*"), key=lambda run: run.name, reverse=True):
        folder = run / "checkpoints"
        restore_replaced(folder)
        begun = saved_steps(folder) or (folder / "last.json").exists()
        if begun and (earlier := _run_config(run)).recipe == config.recipe:
            _check_same(config, earlier, run)
            return newest_whole(run)
    log.info(
        "--resume auto: no run of recipe %s under %s/ has a checkpoint; starting a new one",
        config.recipe,
        out,
    )
    return None


def newest_whole(run: Path) -> Path:
    """The newest checkpoint of a run that is what its manifest says; each damaged one is named.

    Raises:
        CorruptFileError: none is whole.
    """
    for folder in reversed(saved_steps(run / "checkpoints").values()):
        try:
            verify_checkpoint(folder)
        except CorruptFileError as error:
            log.warning(f"{error}; going on from the checkpoint before it")
        else:
            return folder
    raise CorruptFileError(f"no checkpoint of {run} is whole; start a new run with --resume none")


def best_until(run: Path, step: int) -> Pointer | None:
    """The best evaluated checkpoint of a run up to a step, by the manifests; of equals, the earliest.

    `best.json` may name a later one, or one from before a crash.
    """
    found = []
    for saved, folder in saved_steps(run / "checkpoints").items():
        with suppress(CorruptFileError):
            top1 = read_manifest(folder).metrics.get("top1")
            if saved <= step and top1 is not None:
                found.append((top1, -saved, folder))
    for top1, minus_step, folder in sorted(found, reverse=True):
        with suppress(CorruptFileError):
            verify_checkpoint(folder)
            return Pointer(step=-minus_step, top1=top1)
    return None


def go_back_to(folder: RunFolder, step: int) -> Pointer | None:
    """Make a run what it was at a step: no checkpoint, row or pointer from behind it counts any more.

    In this order: a kill in between must not leave rows missing for a checkpoint that would be resumed.

    Returns:
        The best checkpoint up to there.
    Raises:
        SaveError: the disk does not allow it.
    """
    try:
        aside = supersede_after(folder.checkpoints, step)
        dropped = folder.drop_rows_after(step)
        remove_leftovers(folder.checkpoints)
        best = best_until(folder.path, step)
        if best is None:
            (folder.checkpoints / "best.json").unlink(missing_ok=True)
        else:
            folder.point("best", best)
    except OSError as error:
        raise SaveError(
            f"{folder.path} cannot be gone on with: {error.filename}: {error.strerror}"
        ) from error
    if aside:
        log.info(f"{len(aside)} checkpoint(s) after step {step} are set aside until the next one is written")
    log.info(f"resuming at step {step}; {dropped} later row(s) of metrics.jsonl dropped")
    return best


def _run_config(run: Path) -> RunConfig:
    path = run / "config.json"
    try:
        return decode_config(msgspec.json.decode(read_small(path)))
    except OSError as error:
        raise CorruptFileError(f"run {run} has no readable config.json: {error.strerror}") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise CorruptFileError(f"{path} is damaged: {error}") from error


def _check_same(wanted: RunConfig, earlier: RunConfig, run: Path) -> None:
    differing = _differences(msgspec.to_builtins(earlier), msgspec.to_builtins(wanted))
    if differing:
        raise UserError(
            f"cannot resume {run} with another configuration ({'; '.join(differing)}); "
            "use the same recipe and --set, or start a new run with --resume none"
        )


def _differences(earlier: dict[str, Any], wanted: dict[str, Any], prefix: str = "") -> list[str]:
    found = []
    for key, old in earlier.items():
        new = wanted[key]
        if not prefix and key in FREE_TO_CHANGE:
            continue
        if isinstance(old, dict):
            found += _differences(old, new, f"{prefix}{key}.")
        elif old != new:
            found.append(f"{prefix}{key} was {old!r}, now {new!r}")
    return found
