"""Writing a checkpoint so that it is whole or does not exist. No collectives: any thread may do it."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast

import msgspec
import torch
from torch.utils.serialization import config as serialization

from data_pipeline.common.errors import SaveError
from data_pipeline.common.files import fsync_path, write_json
from data_pipeline.datasets.dataset import Contents
from train.checkpoints.load import FORMAT, MANIFEST, STATE, Manifest
from train.checkpoints.retention import REPLACED, WRITING, step_folder
from train.checkpoints.safe_load import Progress
from train.config.load import RunConfig


@dataclass(frozen=True)
class State:
    """What a checkpoint holds, apart from the training that goes on beside it.

    Args:
        parts: the state of each of `load.PARTS` that there is, on the CPU, in memory that nobody
            changes until the state is written.
        wait_until_copied: returns when `parts` hold what they are to hold; copies from a GPU take their time.

    The other fields are those of `train.checkpoints.load.Checkpoint`.
    """

    step: int
    epoch: int
    samples_seen: int
    config: RunConfig
    classes: tuple[str, ...]
    metrics: dict[str, float]
    parts: dict[str, dict[str, Any]]
    progress: Progress = field(default_factory=Progress)
    labels_text: tuple[str, ...] = ()
    data: dict[str, Contents] = field(default_factory=dict)
    wait_until_copied: Callable[[], None] = lambda: None


def save_checkpoint(folder: Path, state: State) -> Path:
    """Write one checkpoint: temporary name, fsync of files and folders, rename.

    Args:
        folder: the run's `checkpoints/`; an existing folder for the same step is replaced.
    Returns:
        The step's folder.
    Raises:
        SaveError: the disk is full, or cannot be written to; what was there before is untouched.
    """
    final = step_folder(folder, state.step)
    temporary, replaced = folder / f"{WRITING}{final.name}", folder / f"{REPLACED}{final.name}"
    state.wait_until_copied()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        manifest = _write_state(temporary / STATE, state)
        write_json(temporary / MANIFEST, manifest)
        fsync_path(temporary)
        if final.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            final.rename(replaced)
        temporary.rename(final)
        fsync_path(folder)
        shutil.rmtree(replaced, ignore_errors=True)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise SaveError(f"checkpoint {final} could not be written: {error.strerror}") from error
    return final


def _write_state(path: Path, state: State) -> Manifest:
    """Write `state.pt` to the disk, hashed on the way. Returns the manifest that belongs to it."""
    content = {
        "format": FORMAT,
        **state.parts,
        "progress": msgspec.to_builtins(state.progress),
        "step": state.step,
        "epoch": state.epoch,
        "samples_seen": state.samples_seen,
        "config": msgspec.to_builtins(state.config),
        "classes": list(state.classes),
        "labels_text": list(state.labels_text),
        "data": msgspec.to_builtins(state.data),
        "preprocessing": msgspec.to_builtins(state.config.preprocessing),
    }
    with path.open("wb") as file:
        hashing = _HashingFile(file)
        try:
            # The zip's own checksums would take three times as long as the hash, and protect less.
            with serialization.patch("save.compute_crc32", False):  # type: ignore[attr-defined]
                torch.save(content, cast("IO[bytes]", hashing))
        except RuntimeError:  # torch's word for a write that failed
            if hashing.error is None:
                raise
            raise hashing.error from None
        file.flush()
    fsync_path(path)
    return Manifest(
        format=FORMAT,
        step=state.step,
        epoch=state.epoch,
        sha256=hashing.digest.hexdigest(),
        size_bytes=hashing.size_bytes,
        metrics=state.metrics,
        weights="average" if state.parts.get("average") else "last",
    )


class _HashingFile:
    """A file for `torch.save` that hashes what passes, so that it need not be read again."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.digest, self.size_bytes = file, hashlib.sha256(), 0
        self.error: OSError | None = None

    def write(self, chunk: bytes) -> int:
        try:
            self.file.write(chunk)
        except OSError as error:
            self.error = self.error or error
            raise
        self.digest.update(chunk)
        self.size_bytes += len(chunk)
        return len(chunk)

    def flush(self) -> None:
        self.file.flush()
