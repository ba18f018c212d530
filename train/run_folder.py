"""The run folder: configuration, metric rows, TensorBoard, and what `--resume` picks up."""

from __future__ import annotations

import logging
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import msgspec

from data_pipeline.errors import CorruptFileError, UserError
from data_pipeline.files import write_atomic
from train.checkpoint import Pointer, find_checkpoint, read_manifest, verify_checkpoint, write_json
from train.config import RunConfig, decode_config

log = logging.getLogger("train")

FREE_TO_CHANGE = (
    "data", "device", "cpu_threads", "micro_batch", "timeout_s", "log_every", "keep_checkpoints",
    "max_skipped", "flat_loss_grace", "log_noise_scale",
)  # fmt: skip
"""Keys that a resumed run may set anew: where it computes, not what. All others decide the result."""


class Row(msgspec.Struct, frozen=True, kw_only=True):
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

    def append(self, row: Row) -> None:
        """Add a row to `metrics.jsonl`."""
        with self.metrics.open("ab") as file:
            file.write(msgspec.json.encode(row) + b"\n")

    def rows(self) -> list[Row]:
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
        lines = self.metrics.read_bytes().splitlines(keepends=True)
        kept = [line for line in lines if (row := _row(line)) is not None and row.step <= step]
        if len(kept) < len(lines):
            write_atomic(self.metrics, b"".join(kept))
        return len(lines) - len(kept)


def _row(line: bytes) -> Row | None:
    try:
        return msgspec.json.decode(line, type=Row) if line.endswith(b"\n") else None
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
        folder = find_checkpoint(Path(resume), pointer="last")
        if folder.parent.name != "checkpoints":
            raise UserError(
                f"{folder} does not lie in a run's checkpoints/, so there is no run to go on with; "
                "name a run, or a checkpoint inside one"
            )
        read_manifest(folder)
        _check_same(config, _run_config(folder.parent.parent), folder.parent.parent)
        return folder
    runs = [f.parent.parent for f in out.glob(f"{config.recipe}-*/checkpoints/last.json")]
    runs = [run for run in runs if _run_config(run).recipe == config.recipe]
    if not runs:
        log.info("--resume auto: no run of recipe %s under %s/ yet; starting a new one", config.recipe, out)
        return None
    newest = max(runs, key=lambda run: run.name)
    _check_same(config, _run_config(newest), newest)
    return newest_whole(newest)


def newest_whole(run: Path) -> Path:
    """The newest checkpoint of a run that is what its manifest says; each damaged one is named.

    Raises:
        CorruptFileError: none is whole.
    """
    for folder in sorted((run / "checkpoints").glob("step-*"), reverse=True):
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
    for folder in sorted((run / "checkpoints").glob("step-*")):
        with suppress(CorruptFileError):
            found.append(read_manifest(folder))
    scored = [(m.metrics["top1"], -m.step) for m in found if m.step <= step and "top1" in m.metrics]
    if not scored:
        return None
    top1, minus_step = max(scored)
    return Pointer(step=-minus_step, top1=top1)


def _run_config(run: Path) -> RunConfig:
    path = run / "config.json"
    try:
        return decode_config(msgspec.json.decode(path.read_bytes()))
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
