"""The run folder: configuration, metric rows, TensorBoard and checkpoints."""

from __future__ import annotations

import os
from datetime import datetime, timezone
from pathlib import Path

import msgspec

from data_pipeline.common.errors import SaveError, UserError, raising
from data_pipeline.common.files import RetryingAppendFile, fsync_path, write_atomic, write_json, writing_to
from data_pipeline.results.class_report import ClassReport
from train.config.load import to_json
from train.config.schema import RunConfig


class MetricsRow(msgspec.Struct, frozen=True, kw_only=True):
    """One line of `metrics.jsonl`. `top1` and `top5` are fractions; `images_per_s` is over all ranks.

    `skipped` steps changed nothing, and their samples are not counted. NaN and infinity are null.
    With `log_noise_scale`, training rows have `grad_square` and `grad_trace`, estimates of |G|² and tr(S)
    over the row's steps, and `noise_scale`, the ratio of their moving averages, in samples. The last
    validation row of a run has the `report` of its classes.
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
    report: ClassReport | msgspec.UnsetType = msgspec.UNSET


class RunFolder:
    """Paths inside `runs/<recipe>-<utc time>/`, and the rows in it.

    Attributes:
        metrics: one JSON row per event.
        checkpoints: step folders and the pointers `best.json` and `last.json`.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.metrics, self.checkpoints = path, path / "metrics.jsonl", path / "checkpoints"
        self._rows_file = RetryingAppendFile(self.metrics)

    def append(self, row: MetricsRow) -> OSError | None:
        """Add a row to `metrics.jsonl`.

        Returns:
            The error, if it and what was kept before are not in the file yet.
        """
        return self._rows_file.append(msgspec.json.encode(row) + b"\n")

    def sync_rows(self) -> None:
        """Return when all rows so far are on the disk: a checkpoint of a later step may follow.

        Raises:
            SaveError: the disk does not take them; they are kept.
        """
        with raising(SaveError, f"the rows of {self.metrics} could not be written"):
            self._rows_file.sync()

    def write_config(self, config: RunConfig) -> None:
        """Write `config.json`, unless it says the same.

        Raises:
            SaveError: it cannot be written.
        """
        path = self.path / "config.json"
        if not path.exists() or path.read_bytes() != to_json(config).encode() + b"\n":
            save_json(path, config)

    def rows(self) -> list[MetricsRow]:
        """Return the rows so far, in order, without half a line at the end."""
        lines = self.metrics.read_bytes().splitlines(keepends=True) if self.metrics.exists() else []
        return [row for line in lines if (row := _decode_row(line)) is not None]

    def drop_rows_after(self, step: int) -> int:
        """Drop the rows of steps that a resumed run will repeat, and half a line at the end.

        Returns:
            How many lines were dropped.
        """
        if not self.metrics.exists():
            return 0
        content = self.metrics.read_bytes()
        lines = content.splitlines(keepends=True)
        kept = b"".join(line for line in lines if (row := _decode_row(line)) is not None and row.step <= step)
        if content.startswith(kept):  # truncating needs no room on the disk
            os.truncate(self.metrics, len(kept))
            fsync_path(self.metrics)
        else:
            write_atomic(self.metrics, kept)
        return len(lines) - kept.count(b"\n")


def save_json(path: Path, value: msgspec.Struct) -> None:
    """Write a small file of a run, whole or not at all.

    Raises:
        SaveError: the disk is full, or cannot be written to.
    """
    with raising(SaveError, f"{path} could not be written"):
        write_json(path, value)


def _decode_row(line: bytes) -> MetricsRow | None:
    try:
        return msgspec.json.decode(line, type=MetricsRow) if line.endswith(b"\n") else None
    except msgspec.DecodeError:
        return None


def create_run(out: Path, config: RunConfig) -> RunFolder:
    """Make a new run folder under `out`, named by recipe and time, with `config.json` in it.

    Raises:
        UserError, SaveError: it cannot be written there.
    """
    name = f"{config.recipe}-{datetime.now(timezone.utc):%Y%m%dT%H%M%SZ}"
    for suffix in ("", *(f"-{n}" for n in range(2, 1000))):
        path = out / f"{name}{suffix}"
        with writing_to(path, "name another folder for the run"):
            out.mkdir(parents=True, exist_ok=True)
            try:
                path.mkdir()
            except FileExistsError:
                continue
            write_json(path / "config.json", config)
            (path / "checkpoints").mkdir()
            fsync_path(path)
            fsync_path(out)
        return RunFolder(path)
    raise UserError(f"{out} holds a thousand runs of this second")
