"""Writes a checkpoint so that it is complete or absent. No collectives: any thread may do it."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import IO, cast

import msgspec
import torch
from torch.utils.serialization import config as serialization

from data_pipeline.common.errors import SaveError
from data_pipeline.common.files import fsync_path
from train.checkpoints.format import COMPONENTS, FIELDS, FORMAT, STATE, Manifest, Snapshot, write_manifest
from train.checkpoints.retention import REPLACED, WRITING, step_folder


def save_checkpoint(folder: Path, snapshot: Snapshot) -> Path:
    """Write one checkpoint: temporary name, fsync of files and folders, rename.

    Args:
        folder: the run's `checkpoints/`; an existing folder for the same step is replaced.
    Returns:
        The step's folder.
    Raises:
        SaveError: the disk is full, or cannot be written to; what was there before is untouched.
    """
    final = step_folder(folder, snapshot.step)
    temporary, replaced = folder / f"{WRITING}{final.name}", folder / f"{REPLACED}{final.name}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        manifest = _write_state(temporary / STATE, snapshot)
        write_manifest(temporary, manifest)
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


def _write_state(path: Path, snapshot: Snapshot) -> Manifest:
    """Write `state.pt` to the disk and hash it on the way. Returns its manifest."""
    payload = {
        "format": FORMAT,
        **{name: snapshot.states.get(name, {}) for name in COMPONENTS},
        **{name: msgspec.to_builtins(getattr(snapshot, name)) for name in FIELDS},
    }
    with path.open("wb") as file:
        hashing = _HashingFile(file)
        try:
            # The zip's own checksums would take three times as long as the hash, and protect less.
            with serialization.patch("save.compute_crc32", False):  # type: ignore[attr-defined]
                torch.save(payload, cast("IO[bytes]", hashing))
        except RuntimeError:  # torch raises it for any write that fails, without the reason
            if hashing.error is None:
                raise
            raise hashing.error from None
        file.flush()
    fsync_path(path)
    return Manifest(
        format=FORMAT,
        step=snapshot.step,
        epoch=snapshot.epoch,
        sha256=hashing.digest.hexdigest(),
        size_bytes=hashing.size_bytes,
        metrics=snapshot.metrics,
        weights="average" if snapshot.states.get("average") else "last",
    )


class _HashingFile:
    """A file for `torch.save` that hashes what is written, so that it need not be read again."""

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
