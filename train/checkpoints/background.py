"""Checkpoints beside training: copied while a step waits, written while the next ones run."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from data_pipeline.common.errors import SaveError
from train.checkpoints.load import Pointer
from train.checkpoints.retention import prune_checkpoints
from train.checkpoints.write import State, save_checkpoint
from train.config.load import RunConfig
from train.runs.folder import RunFolder

log = logging.getLogger("train")


class AsyncCheckpointWriter:
    """Writes the checkpoints of one run, one at a time, on a thread of its own; rank 0 has it.

    Args:
        folder: the run's.
        config: says how many of the newest stay, and every which one.
        best: the best validation top-1 so far.
    """

    def __init__(self, folder: RunFolder, config: RunConfig, best: Pointer | None) -> None:
        self.folder, self.config, self.best = folder, config, best
        self.copies = PinnedStaging()
        self.unsaved: str | None = None
        """Why the newest checkpoint could not be written, if so; of the time before a `wait`."""
        self.num_saved = 0
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._in_flight: tuple[int, Future[None]] | None = None

    def wait(self, reason: str | None = None) -> None:
        """Return when no checkpoint is being written, and the copies may be overwritten.

        Args:
            reason: what has to wait, said where it does; None where waiting is no news.
        """
        if self._in_flight is None:
            return
        step, writing = self._in_flight
        started, late = time.monotonic(), not writing.done()
        if late and reason is not None:
            log.warning(f"{reason} waits: the checkpoint of step {step} is still being written")
        try:
            writing.result()
        finally:
            self._in_flight = None
        if late and reason is not None:
            log.warning(f"training was held up for {time.monotonic() - started:.1f} s by the disk")

    def start(self, state: State) -> None:
        """Write a state in the background. Nothing may be in flight: `wait` comes before the copying."""
        assert self._in_flight is None
        self._in_flight = state.step, self._thread.submit(self._write, state)

    def close(self) -> None:
        """Finish what is being written. On every path: it may be the best that is left of the run."""
        self._thread.shutdown(wait=True)

    def _write(self, state: State) -> None:
        """What the thread does: nothing points to it, and nothing is removed, before it is on the disk.

        Nor is it there before the rows up to it, which a resumed run would not write again.
        """
        top1 = state.metrics.get("top1")
        try:
            self.folder.sync_rows()
            save_checkpoint(self.folder.checkpoints, state)
            if top1 is not None and (self.best is None or top1 > (self.best.top1 or 0.0)):
                self.best = Pointer(step=state.step, top1=top1)
            try:
                if self.best is not None:
                    self.folder.point("best", self.best)
                self.folder.point("last", Pointer(step=state.step, top1=top1))
                prune_checkpoints(
                    self.folder.checkpoints,
                    keep_last=self.config.keep_checkpoints,
                    keep_every=self.config.keep_every,
                    best=self.best.step if self.best is not None else None,
                )
            except OSError as error:
                log.error(
                    f"checkpoint {state.step} is written, but {error.filename} could not be changed or "
                    f"removed: {error.strerror}; training goes on"
                )
            self.unsaved = None
            self.num_saved += 1
        except SaveError as error:
            self.unsaved = str(error)
            log.error(f"{error}; training goes on, and the checkpoints before it are untouched")


class PinnedStaging:
    """The memory that states are copied to, allocated once: fresh memory takes longer than the copy."""

    def __init__(self) -> None:
        self._held: dict[tuple[object, ...], Tensor] = {}

    def take(self, value: Any, *path: object) -> Any:
        """Copy nested dicts and lists, with all tensors in the host's memory.

        Copies from a GPU are under way when this returns: they come in the stream's order before whatever
        training does next, and `copied` says when they are done.

        Args:
            value: of tensors and plain values.
            path: names where in the state it stands, so that it finds the same memory again.
        """
        if isinstance(value, Tensor):
            held = self._held.get(path)
            if held is None or (held.shape, held.dtype, held.stride()) != (
                value.shape,
                value.dtype,
                value.stride(),
            ):
                held = self._held[path] = torch.empty_strided(
                    value.shape, value.stride(), dtype=value.dtype, pin_memory=value.is_cuda
                )
            return held.copy_(value, non_blocking=True)
        if isinstance(value, dict):
            return {key: self.take(inner, *path, key) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self.take(inner, *path, number) for number, inner in enumerate(value))
        return value


def copied(device: torch.device) -> Callable[[], None]:
    """A wait, for any thread, for the copies that the device has been given up to now."""
    if device.type != "cuda":
        return lambda: None
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    return event.synchronize
