"""Checkpoints written beside training: a step waits for the copy alone, a thread writes it to the disk."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_pipeline.common.errors import SaveError
from train.checkpoints.format import Pointer, Snapshot, write_pointer
from train.checkpoints.retention import prune_checkpoints
from train.checkpoints.write import save_checkpoint
from train.config.schema import RunConfig

log = logging.getLogger("train")


class AsyncCheckpointWriter:
    """Writes the checkpoints of one run, one at a time, on a thread of its own; only rank 0 has one.

    Args:
        folder: the run's `checkpoints/`.
        config: whose `keep_checkpoints` and `keep_every` decide which checkpoints stay.
        best: the checkpoint with the best validation top-1 so far.
        before_write: called on the thread before each checkpoint; it may raise `SaveError`. It brings the
            rows so far to the disk, since a run that resumes from the checkpoint does not write them again.
    """

    def __init__(
        self, folder: Path, config: RunConfig, best: Pointer | None, before_write: Callable[[], None]
    ) -> None:
        self.folder, self.config, self.best, self.before_write = folder, config, best, before_write
        self.staging = PinnedStaging()
        self.failure: str | None = None
        """Error of the last failed write, None after a successful one. Up to date only after `wait()`."""
        self.num_saved = 0
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._in_flight: tuple[int, Future[None]] | None = None

    def wait(self, waiting: str | None = None) -> str | None:
        """Return when no checkpoint is being written, and the staging memory may be overwritten.

        Args:
            waiting: what has to wait, for the log; None to wait silently.
        Returns:
            The error of the last write; None if it succeeded.
        """
        if self._in_flight is None:
            return self.failure
        (step, writing), self._in_flight = self._in_flight, None
        started, late = time.monotonic(), not writing.done()
        if late and waiting is not None:
            log.warning(f"{waiting} waits: the checkpoint of step {step} is still being written")
        writing.result()
        if late and waiting is not None:
            log.warning(f"training was held up for {time.monotonic() - started:.1f} s by the disk")
        return self.failure

    def start(self, snapshot: Snapshot) -> None:
        """Write a snapshot in the background. Call `wait` before taking it: nothing may be in flight.

        Args:
            snapshot: in memory of `staging`, to which copies may still be under way.
        """
        assert self._in_flight is None
        copied = None
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            copied.record()
        self._in_flight = snapshot.step, self._thread.submit(self._write, snapshot, copied)

    def close(self) -> None:
        """Finish the write in flight, on every path: it may be the newest checkpoint of the run."""
        self._thread.shutdown(wait=True)

    def _write(self, snapshot: Snapshot, copied: torch.cuda.Event | None = None) -> None:
        """Write on the thread: first the checkpoint, then the pointers to it, then remove older ones."""
        if copied is not None:
            copied.synchronize()
        top1 = snapshot.metrics.get("top1")
        try:
            self.before_write()
            save_checkpoint(self.folder, snapshot)
            if top1 is not None and (self.best is None or top1 > (self.best.top1 or 0.0)):
                self.best = Pointer(step=snapshot.step, top1=top1)
            self._point_and_prune(Pointer(step=snapshot.step, top1=top1))
            self.failure = None
            self.num_saved += 1
        except SaveError as error:
            self.failure = str(error)
            log.error(f"{error}; training goes on, and the checkpoints before it are untouched")

    def _point_and_prune(self, last: Pointer) -> None:
        try:
            if self.best is not None:
                write_pointer(self.folder, "best", self.best)
            write_pointer(self.folder, "last", last)
            prune_checkpoints(self.folder, self.config, self.best.step if self.best is not None else None)
        except OSError as error:
            log.error(
                f"checkpoint {last.step} is written, but {error.filename} could not be changed or "
                f"removed: {error.strerror}; training goes on"
            )


class PinnedStaging:
    """Host memory that states are copied to, allocated once: fresh memory takes longer than the copy."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[object, ...], Tensor] = {}

    def copy(self, value: Any, *path: object) -> Any:
        """Copy nested dicts and lists, with all tensors in the host's memory.

        Copies from a GPU are asynchronous, and ordered before whatever training does next on the stream.

        Args:
            value: nested dicts, lists and tuples of tensors and plain values.
            path: keys and indices from the root to `value`: the same path uses the same memory again.
        """
        if isinstance(value, Tensor):
            buffer, layout = self._buffers.get(path), (value.shape, value.dtype, value.stride())
            if buffer is None or (buffer.shape, buffer.dtype, buffer.stride()) != layout:
                buffer = self._buffers[path] = torch.empty_strided(
                    value.shape, value.stride(), dtype=value.dtype, pin_memory=value.is_cuda
                )
            return buffer.copy_(value, non_blocking=True)
        if isinstance(value, dict):
            return {key: self.copy(inner, *path, key) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self.copy(inner, *path, number) for number, inner in enumerate(value))
        return value
