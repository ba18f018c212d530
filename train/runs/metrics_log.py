"""Rows of a run: to `metrics.jsonl` and TensorBoard on rank 0, nowhere on the others."""

from __future__ import annotations

import io
import logging
import math
import os
import socket
import time
from pathlib import Path
from typing import Protocol

import msgspec
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from data_pipeline.common.files import RetryingAppendFile
from train.health.metrics import Metrics
from train.health.noise_scale import NoiseEstimate
from train.runs.folder import MetricsRow
from train.runs.noise_rows import NoiseRows
from train.setup import RunState

log = logging.getLogger("train")


class Recorder(Protocol):
    """Where rows go."""

    def __call__(
        self,
        split: str,
        metrics: Metrics,
        lr: float,
        images_per_s: float,
        skipped: int = 0,
        noise: NoiseEstimate | None = None,
    ) -> None:
        """Write one row for the present step."""


def make_recorder(run_state: RunState) -> Recorder:
    """What writes the rows of a run."""
    folder = run_state.folder
    if folder is None:
        return lambda split, metrics, lr, images_per_s, skipped=0, noise=None: None
    board = TensorBoardWriter(folder.path / "tensorboard", purge_step=run_state.step + 1)
    noise_rows = NoiseRows(folder.rows()) if run_state.config.log_noise_scale else None
    failing = False

    def record(
        split: str,
        metrics: Metrics,
        lr: float,
        images_per_s: float,
        skipped: int = 0,
        noise: NoiseEstimate | None = None,
    ) -> None:
        nonlocal failing
        row = MetricsRow(
            split=split,
            epoch=-(-run_state.step // run_state.steps_per_epoch),
            step=run_state.step,
            samples=metrics.num_samples,
            failed=metrics.num_failed,
            skipped=skipped,
            loss=_finite(metrics.loss),
            top1=_finite(metrics.top1),
            top5=_finite(metrics.top5),
            lr=lr,
            images_per_s=images_per_s,
            time=time.time(),
            **(noise_rows.fields(noise) if noise_rows is not None and split == "train" else {}),
        )
        figures = {
            f"{split}/{name}": value
            for name, value in msgspec.structs.asdict(row).items()
            if name not in ("split", "epoch", "step", "time") and isinstance(value, int | float)
        }
        errors = (folder.append(row), board.add(figures, run_state.step))
        error = errors[0] or errors[1]
        if error is not None and not failing:
            log.error(
                f"{error.filename} could not be written: {error.strerror}; training goes on, and what "
                "belongs there is kept until there is room"
            )
        failing = error is not None

    return record


class TensorBoardWriter:
    """A file of scalars for TensorBoard. TensorBoard's own writer does not survive a full disk.

    Args:
        folder: where event files lie; a run has one for each time that it was started.
        purge_step: what earlier files say of this step and later ones counts no more.
    """

    def __init__(self, folder: Path, purge_step: int) -> None:
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}"
        self.file = RetryingAppendFile(folder / name)
        self._append(Event(wall_time=time.time(), file_version="brain.Event:2"))
        start = SessionLog(status=SessionLog.START)
        self._append(Event(wall_time=time.time(), step=purge_step, session_log=start))

    def add(self, figures: dict[str, float], step: int) -> OSError | None:
        """Add the figures of one step.

        Returns:
            Why they, and what was kept before, are not on the disk yet, if so.
        """
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in figures.items()]
        return self._append(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))

    def _append(self, event: Event) -> OSError | None:
        framed = io.BytesIO()
        RecordWriter(framed).write(event.SerializeToString())
        return self.file.append(framed.getvalue())


def _finite(value: float) -> float | None:
    """JSON has no NaN: null stands for it."""
    return value if math.isfinite(value) else None
