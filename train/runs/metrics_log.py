"""The rows of a run: to `metrics.jsonl` and TensorBoard on rank 0, nowhere on the other ranks."""

from __future__ import annotations

import io
import logging
import math
import os
import socket
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from data_pipeline.common.files import RetryingAppendFile
from train.health.metrics import Metrics
from train.health.noise_scale import NoiseEstimate, smooth_noise
from train.runs.folder import MetricsRow, RunFolder

log = logging.getLogger("train")


class MetricsLog:
    """Writes rows; those that the disk does not take are kept and written later.

    Args:
        folder: the run's; None on the ranks other than 0, which write nothing.
        step: optimiser steps finished when the run starts or resumes.
        steps_per_epoch: optimiser steps of an epoch.
        noise: whether training rows have the gradient noise scale (`log_noise_scale`).
        step_offset: see `train.checkpoints.format.Progress`.
    """

    def __init__(
        self, folder: RunFolder | None, step: int, steps_per_epoch: int, *, noise: bool, step_offset: int = 0
    ) -> None:
        self._folder, self._steps_per_epoch, self._step_offset = folder, steps_per_epoch, step_offset
        self._noise: NoiseAverages | None = None
        self._failing = False
        if folder is not None:
            self._board = TensorBoardWriter(folder.path / "tensorboard", purge_step=step + 1)
            self._noise = NoiseAverages(folder.rows()) if noise else None

    def write(
        self, split: str, step: int, metrics: Metrics, noise: NoiseEstimate | None = None, **fields: Any
    ) -> None:
        """Write one row.

        Args:
            step: optimiser steps finished.
            noise: estimate over the row's steps, if there is one.
            fields: the others of a `MetricsRow`.
        """
        if self._folder is None:
            return
        if self._noise is not None and split == "train":
            fields |= self._noise.fields(noise)
        row = MetricsRow(
            split=split,
            epoch=-((self._step_offset - step) // self._steps_per_epoch),
            step=step,
            samples=metrics.num_samples,
            failed=metrics.num_failed,
            loss=_finite(metrics.loss),
            top1=_finite(metrics.top1),
            top5=_finite(metrics.top5),
            time=time.time(),
            **fields,
        )
        scalars = {
            f"{split}/{name}": value
            for name, value in msgspec.structs.asdict(row).items()
            if name not in ("split", "epoch", "step", "time") and isinstance(value, int | float)
        }
        errors = self._folder.append(row), self._board.add(scalars, step)
        error = errors[0] or errors[1]
        if error is not None and not self._failing:
            log.error(
                f"{error.filename} could not be written: {error.strerror}; training goes on, and what "
                "belongs there is kept until there is room"
            )
        self._failing = error is not None


class NoiseAverages:
    """Moving averages of the gradient noise scale; they follow from the rows, so a resumed run has them.

    Args:
        rows: those that the run has so far.
    """

    def __init__(self, rows: Iterable[MetricsRow]) -> None:
        self._average: NoiseEstimate | None = None
        last_step = 0
        for row in rows:
            if row.split != "train":
                continue
            if isinstance(row.grad_square, float) and isinstance(row.grad_trace, float):
                steps = row.step - last_step - row.skipped
                new = NoiseEstimate(square=row.grad_square, trace=row.grad_trace, num_steps=steps)
                self._average = smooth_noise(self._average, new)
            last_step = row.step

    def fields(self, new: NoiseEstimate | None) -> dict[str, float | None]:
        """Return a row's fields for the steps since the last row; None without a finite estimate."""
        if new is None or not (math.isfinite(new.square) and math.isfinite(new.trace)):
            return dict.fromkeys(("grad_square", "grad_trace", "noise_scale"))
        self._average = smooth_noise(self._average, new)
        return {"grad_square": new.square, "grad_trace": new.trace, "noise_scale": self._average.scale}


class TensorBoardWriter:
    """Writes scalars to a file for TensorBoard. TensorBoard's own writer does not survive a full disk.

    Args:
        folder: of event files; a run has one for each time that it was started.
        purge_step: TensorBoard ignores this step and later ones in earlier files.
    """

    def __init__(self, folder: Path, purge_step: int) -> None:
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}"
        self.file = RetryingAppendFile(folder / name)
        self._append(Event(wall_time=time.time(), file_version="brain.Event:2"))
        start = SessionLog(status=SessionLog.START)
        self._append(Event(wall_time=time.time(), step=purge_step, session_log=start))

    def add(self, scalars: dict[str, float], step: int) -> OSError | None:
        """Add the scalars of one step.

        Returns:
            The error, if they and what was kept before are not on the disk yet.
        """
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
        return self._append(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))

    def _append(self, event: Event) -> OSError | None:
        framed = io.BytesIO()
        RecordWriter(framed).write(event.SerializeToString())
        return self.file.append(framed.getvalue())


def _finite(value: float) -> float | None:
    """Return None, JSON's null, for NaN and infinity, which JSON does not have."""
    return value if math.isfinite(value) else None
