"""Small checkpoints, rows and manifests for tests, and files as a stranger might craft them."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import torch

from data_pipeline.common.files import sha256_of
from data_pipeline.results.sealed import SEAL, seal_of
from tests.helpers.ranks import TINY
from train.checkpoints.background import AsyncCheckpointWriter
from train.checkpoints.format import MANIFEST, STATE, Pointer, Snapshot
from train.checkpoints.write import save_checkpoint
from train.config.load import make_config
from train.config.schema import RunConfig
from train.models.alexnet import AlexNet, make_model
from train.runs.folder import MetricsRow, RunFolder

CONFIG = make_config("demo", ["keep_checkpoints=1"])
CLASSES = tuple("0123456789")


def small_snapshot(step: int, value: float = 1.0, top1: float | None = None) -> Snapshot:
    """A snapshot of nine numbers, which is written in no time."""
    return Snapshot(
        step=step,
        epoch=0,
        samples_seen=step * 64,
        config=CONFIG,
        classes=("a", "b"),
        metrics={} if top1 is None else {"top1": top1},
        states={
            "model": {"weight": torch.full((3, 3), value)},
            "optimizer": {"state": {}, "param_groups": []},
        },
    )


def make_writer(folder: RunFolder, best: Pointer | None = None) -> AsyncCheckpointWriter:
    """The writer of a run, which keeps the newest checkpoint and the best."""
    return AsyncCheckpointWriter(folder.checkpoints, CONFIG, best, folder.sync_rows)


def row(step: int) -> MetricsRow:
    """A training row."""
    return MetricsRow(
        split="train", epoch=1, step=step, samples=1, failed=0, loss=1.0, top1=0.0, top5=0.0,
        lr=0.1, images_per_s=1.0, time=0.0,
    )  # fmt: skip


def small_config() -> RunConfig:
    """The configuration of `save_small_network`."""
    return make_config("demo", TINY)


def save_small_network(folder: Path, step: int = 3, top1: float = 0.5) -> tuple[Path, AlexNet]:
    """Save a checkpoint of weights alone. Returns its folder, and the network."""
    config = small_config()
    model = make_model(config.model, num_classes=10, crop_px=22)
    snapshot = Snapshot(
        step=step,
        epoch=1,
        samples_seen=step * 64,
        config=config,
        classes=CLASSES,
        metrics={"top1": top1},
        states={"model": model.state_dict()},
    )
    return save_checkpoint(folder, snapshot), model


def replace(path: Path, content: bytes) -> None:
    """Write a new file in place of a hard link, whose other names keep the old content."""
    path.unlink()
    path.write_bytes(content)


def forge(folder: Path, **changes: object) -> None:
    """Make a checkpoint's manifest fit its state file, with some fields changed, and seal it again."""
    manifest = msgspec.json.decode((folder / MANIFEST).read_bytes())
    manifest |= {"sha256": sha256_of(folder / STATE), "size_bytes": (folder / STATE).stat().st_size}
    manifest |= changes
    replace(folder / MANIFEST, msgspec.json.encode(manifest | {SEAL: seal_of(manifest)}))


class Evil:
    """An object of a crafted checkpoint: unpickling it would make a folder."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.target),)
