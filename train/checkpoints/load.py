"""Checkpoints are verified before they are believed; `train.checkpoints.write` writes them.

runs/<run>/checkpoints/step-00001234/state.pt       model, optimizer, scaler, position, configuration
                                    /manifest.json  sha256 and size of state.pt, step, metrics
runs/<run>/checkpoints/{best,last}.json             {"step": 1234, "top1": 0.5}
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import msgspec
import torch
from torch import Tensor

from data_pipeline.common.errors import CorruptFileError, UserError
from data_pipeline.common.files import read_small, sha256_of
from data_pipeline.datasets.dataset import Contents
from data_pipeline.transforms.preprocessing import Preprocessing
from train.checkpoints.retention import step_folder
from train.checkpoints.safe_load import CheckpointPayload, Progress, load_plain
from train.config.load import RunConfig, decode_config
from train.config.schema import ModelConfig
from train.health.flat_loss import FlatLoss
from train.models.alexnet import AlexNet, count_hidden_weights, make_model

FORMAT = 2
"""1 had no average of the weights, and is read as such."""
STATE, MANIFEST = "state.pt", "manifest.json"
PARTS = ("model", "average", "optimizer", "scaler", "guard", "row")
"""What has a state of its own in a checkpoint, as its `state_dict` gave it; an older file may lack some."""
Weights = Literal["last", "average"]


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """What stands beside a state file, and is believed before it.

    Args:
        metrics: of the validation split, with the weights that `weights` tells.
        weights: those of the last step, or their average over training.
    """

    format: int
    step: int
    epoch: int
    sha256: str
    size_bytes: int
    metrics: dict[str, float]
    weights: Weights = "last"


class Pointer(msgspec.Struct, frozen=True, kw_only=True):
    """`best.json` or `last.json`: which step, and its validation top-1 if it was evaluated."""

    step: int
    top1: float | None


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint in memory, on the CPU.

    Args:
        folder: the step's folder.
        sha256: of `state.pt`; exported models carry it.
        step, epoch: optimiser steps and epochs finished.
        samples_seen: training samples used, which is the position in the data stream.
        metrics: of the validation split at this step.
        parts: the state of each of `PARTS`; empty where the run has no such part, or the checkpoint is older.
        progress: the run's course; empty in checkpoints from before it was kept.
        labels_text: names of the classes for people; empty where the data had none.
        data: which samples the splits "train" and "val" held; empty in weights from elsewhere.
    """

    folder: Path
    sha256: str
    step: int
    epoch: int
    samples_seen: int
    config: RunConfig
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    metrics: dict[str, float]
    parts: dict[str, dict[str, Any]]
    progress: Progress
    labels_text: tuple[str, ...] = ()
    data: dict[str, Contents] = field(default_factory=dict)

    @property
    def model_state(self) -> dict[str, Tensor]:
        """The weights that training goes on with."""
        return self.parts["model"]

    @property
    def average_state(self) -> dict[str, Tensor]:
        """Their average, where the run keeps one (`ema_decay`); else empty."""
        return self.parts["average"]

    @property
    def class_labels(self) -> tuple[str, ...]:
        """The names of the classes for people, else the classes themselves."""
        return self.labels_text or self.classes

    @property
    def weights(self) -> dict[str, Tensor]:
        """The weights that were evaluated, and that are exported: the average where there is one."""
        return self.average_state or self.model_state

    @property
    def weights_name(self) -> Weights:
        """Which of the two they are."""
        return "average" if self.average_state else "last"

    @property
    def description(self) -> str:
        """What a person is told is used."""
        average = f": the average of its weights (ema_decay {self.config.ema_decay:g})"
        return f"{self.folder}{average if self.average_state else ''}"

    @property
    def run_folder(self) -> Path:
        """The run that this checkpoint belongs to."""
        return self.folder.parent.parent

    def make_model(self) -> AlexNet:
        """The network with the weights that were evaluated, in evaluation mode.

        Raises:
            UserError: weights that do not fit the configuration saved with them.
        """
        return make_loaded(
            self.config.model, self.weights, len(self.classes), self.preprocessing.crop_px, self.folder
        ).eval()


def make_loaded(
    config: ModelConfig, weights: dict[str, Tensor], num_classes: int, crop_px: int, source: Path
) -> AlexNet:
    """A network of weights that came with its configuration; only one of their size is built.

    Raises:
        UserError: weights that do not fit the configuration, with how they differ.
    """
    wanted = count_hidden_weights(config, num_classes=num_classes, crop_px=crop_px)
    held = sum(tensor.numel() for tensor in weights.values() if tensor.ndim == 2)
    if wanted != held:
        raise UserError(
            f"{source} holds another model's weights (its fully connected layers have {held} weights, those "
            f"of its configuration {wanted})"
        )
    model = make_model(config, num_classes=num_classes, crop_px=crop_px)
    load_weights(model, weights, source=source)
    return model


def load_weights(model: torch.nn.Module, state: dict[str, Tensor], source: Path) -> None:
    """Load weights strictly.

    Raises:
        UserError: names or shapes that differ, with the first of each.
    """
    expected = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    found = {name: tuple(t.shape) for name, t in state.items()}
    if expected != found:
        odd = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        shown = f"{odd[0]}: expected {expected.get(odd[0], 'nothing')}, found {found.get(odd[0], 'nothing')}"
        raise UserError(
            f"{source} holds another model's weights ({len(odd)} tensors differ, first {shown}); "
            "use the recipe it was trained with"
        )
    model.load_state_dict(state)


def load_checkpoint(folder: Path) -> Checkpoint:
    """Verify a checkpoint's hash, then read it. Nothing in it is executed.

    Raises:
        CorruptFileError: a missing or damaged manifest or state file, or one that is not ours.
        UserError: a checkpoint of a newer format, or a configuration that this version does not know.
    """
    manifest, path = verify_checkpoint(folder), folder / STATE
    state = load_plain(path)
    try:
        content = msgspec.convert(state, CheckpointPayload)
        if content.step != manifest.step:
            raise ValueError(f"it is of step {content.step}, its manifest of step {manifest.step}")
        return Checkpoint(
            folder=folder,
            sha256=manifest.sha256,
            step=content.step,
            epoch=content.epoch,
            samples_seen=content.samples_seen,
            config=decode_config(content.config),
            classes=content.classes,
            preprocessing=content.preprocessing,
            metrics=manifest.metrics,
            parts={name: dict(state.get(name, {})) for name in PARTS},
            # of the loss before a checkpoint of the first format nothing is known
            progress=content.progress
            or Progress(flat_loss=FlatLoss(since=content.step, window_start=content.step)),
            labels_text=content.labels_text,
            data=content.data,
        )
    except UserError as error:
        raise UserError(f"checkpoint {folder}: {error}") from error
    except ValueError as error:
        raise CorruptFileError(f"{path} is not a checkpoint of ours: {error}") from error


def verify_checkpoint(folder: Path) -> Manifest:
    """Hold a checkpoint's state file against its manifest, without loading it.

    Raises:
        CorruptFileError: a missing or damaged manifest or state file.
        UserError: a checkpoint of a newer format.
    """
    manifest = read_manifest(folder)
    path = folder / STATE
    if folder.parent.name == "checkpoints" and folder != step_folder(folder.parent, manifest.step):
        raise CorruptFileError(f"checkpoint {folder} has the manifest of step {manifest.step}")
    try:
        size_bytes = path.stat().st_size
    except OSError as error:
        raise CorruptFileError(f"checkpoint {folder} has no {STATE}: {error.strerror}") from error
    if not path.is_file():
        raise CorruptFileError(f"checkpoint {path} is no regular file")
    if size_bytes != manifest.size_bytes:
        raise CorruptFileError(
            f"checkpoint {path} is damaged: it has {size_bytes} of {manifest.size_bytes} bytes; "
            "use an earlier one"
        )
    if sha256_of(path) != manifest.sha256:
        raise CorruptFileError(
            f"checkpoint {path} is damaged: its hash is not the one in its manifest; use an earlier one"
        )
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """Read and check `manifest.json` of one checkpoint; see `load_checkpoint` for the errors."""
    path = folder / MANIFEST
    try:
        manifest = msgspec.json.decode(read_small(path), type=Manifest)
    except OSError as error:
        raise CorruptFileError(f"checkpoint {folder} has no readable {MANIFEST}: {error.strerror}") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise CorruptFileError(f"checkpoint manifest {path} is damaged: {error}") from error
    if manifest.format > FORMAT:
        raise UserError(
            f"checkpoint {folder} has format {manifest.format}; this version reads up to {FORMAT}"
        )
    return manifest


def find_checkpoint(path: Path | None, runs: Path = Path("runs"), pointer: str = "best") -> Path:
    """The folder of one checkpoint.

    Args:
        path: a step's folder, its `state.pt`, a run's folder, or None for the newest run.
        runs: where runs are looked for when `path` is None.
        pointer: `best` or `last`, which of a run's checkpoints is meant.
    Raises:
        UserError: nothing there, with what to do.
        CorruptFileError: the run's pointer file is damaged.
    """
    if path is None:
        started = list(runs.glob("*/checkpoints/best.json"))
        if not started:
            raise UserError(f"no checkpoint under {runs}/; train first, or name one")
        path = max(started, key=lambda f: (f.stat().st_mtime_ns, f)).parent.parent
    if path.name == STATE:
        path = path.parent
    if (path / MANIFEST).exists() or (path / STATE).exists():
        return path
    pointer_file = path / "checkpoints" / f"{pointer}.json"
    if not pointer_file.is_file():
        what = "does not exist" if not path.exists() else "is neither a checkpoint nor a run with one"
        raise UserError(f"{path} {what}")
    return step_folder(path / "checkpoints", read_pointer(pointer_file).step)


def read_pointer(path: Path) -> Pointer:
    """Read `best.json` or `last.json`.

    Raises:
        CorruptFileError: not what `write_json` wrote.
    """
    try:
        return msgspec.json.decode(read_small(path), type=Pointer)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise CorruptFileError(f"{path} is damaged: {error}") from error
