"""The files of a checkpoint, and their schemas.

runs/<run>/checkpoints/step-00001234/state.pt       model, optimizer, scaler, position, configuration
                                    /manifest.json  sha256 and size of state.pt, step, metrics
runs/<run>/checkpoints/{best,last}.json             {"step": 1234, "top1": 0.5}
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from torch import Tensor

from data_pipeline.common.errors import CorruptFileError, UserError
from data_pipeline.common.files import read_small, write_atomic, write_json
from data_pipeline.datasets.dataset import Contents
from data_pipeline.results.card import InitRecord
from data_pipeline.results.sealed import SEAL, encode_sealed, take_seal
from train.checkpoints.safe_load import check_tensors
from train.config.schema import RunConfig
from train.health.flat_loss import FlatLoss

FORMAT = 1
STATE, MANIFEST = "state.pt", "manifest.json"
COMPONENTS = ("model", "average", "optimizer", "scaler", "guard", "row")
"""Components of a run whose `state_dict` is in a checkpoint; empty for those that the run does not have."""
FIELDS = ("step", "epoch", "samples_seen", "config", "classes", "labels_text", "data", "progress")
"""Fields of a `Snapshot` that are in a checkpoint as plain values."""
Weights = Literal["last", "average"]


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """`manifest.json`: size and SHA-256 of `state.pt`, checked before it is loaded; sealed by its own hash.

    Attributes:
        metrics: of the validation split, computed with the weights that `weights` names.
        weights: those of the last step, or their moving average.
    """

    format: int
    step: int
    epoch: int
    sha256: str
    size_bytes: int
    metrics: dict[str, float]
    weights: Weights


class Pointer(msgspec.Struct, frozen=True, kw_only=True):
    """`best.json` or `last.json`: a step, and its validation top-1 if it was evaluated."""

    step: int
    top1: float | None


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """Keys of the configuration that a resumed run has had other values of, see `train.runs.changes`.

    Attributes:
        step: optimiser steps finished before.
        what: a text for each key: "epochs was 10, now 20".
    """

    step: int
    what: tuple[str, ...]


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """The history of a run that decides how it continues.

    Attributes:
        val_errors: validation error (1 - top-1) after each epoch so far, by which `plateau` lowers the rate.
        flat_loss: how long the training loss has been flat.
        step_offset: by how many steps more, or fewer if below 0, the finished epochs took than they would
            with the batch of now. 0 unless `global_batch` was changed.
        samples_offset: the same in samples used.
        changes: of the configuration, in order.
        init: what the weights came from at step 0; None where they were made by the seed.
        seconds: of training up to here, by the clock of rank 0: from each start's first step on.
    """

    val_errors: tuple[float, ...] = ()
    flat_loss: FlatLoss = FlatLoss()
    step_offset: int = 0
    samples_offset: int = 0
    changes: tuple[Change, ...] = ()
    init: InitRecord | None = None
    seconds: Annotated[float, msgspec.Meta(ge=0)] = 0.0


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """The state of a run at one step.

    Attributes:
        step, epoch: optimiser steps and epochs finished.
        samples_seen: training samples used, which is the position in the data stream.
        metrics: of the validation split at this step; empty where it was not evaluated.
        states: the `state_dict` of each of `COMPONENTS`, on the CPU; a missing one is saved as empty.
        labels_text: names of the classes for people; empty where the data had none.
        data: which samples the splits "train" and "val" held; empty in imported weights.
    """

    step: int
    epoch: int
    samples_seen: int
    config: RunConfig
    classes: tuple[str, ...]
    states: dict[str, dict[str, Any]]
    metrics: dict[str, float] = field(default_factory=dict)
    progress: Progress = field(default_factory=Progress)
    labels_text: tuple[str, ...] = ()
    data: dict[str, Contents] = field(default_factory=dict)


class OptimizerState(msgspec.Struct, frozen=True):
    """Schema of `torch.optim.SGD.state_dict`."""

    state: dict[int, dict[str, Tensor | None]]
    param_groups: list[dict[str, bool | int | float | list[int] | None]]


class RowState(msgspec.Struct, frozen=True):
    """Schema of `train.runs.running_metrics.RunningMetrics.state_dict`. Shapes: R ranks."""

    integers: Tensor
    loss_sums: Tensor
    noise: Tensor | None
    num_steps: int
    skipped: int
    seconds: float

    def __post_init__(self) -> None:
        if self.loss_sums.ndim != 1 or self.integers.shape != (len(self.loss_sums), 4):
            raise ValueError("the row that was being counted is not one of ours")


class CheckpointPayload(msgspec.Struct, frozen=True, kw_only=True):
    """Schema of `state.pt`: a `Snapshot` without metrics, each state under its own name."""

    step: int
    epoch: int
    samples_seen: int
    config: dict[str, Any]
    classes: tuple[str, ...]
    model: dict[str, Tensor]
    average: dict[str, Tensor]
    optimizer: dict[str, Any]
    scaler: dict[str, float]
    guard: dict[str, Tensor]
    row: dict[str, Any]
    progress: Progress
    labels_text: tuple[str, ...]
    data: dict[str, Contents]

    def __post_init__(self) -> None:
        if len(self.labels_text) not in (0, len(self.classes)):
            raise ValueError("it has not a label for each class")
        tensors = [*self.model.values(), *self.average.values(), *self.guard.values()]
        if self.optimizer:
            optimizer = msgspec.convert(self.optimizer, OptimizerState)
            tensors += [t for state in optimizer.state.values() for t in state.values() if t is not None]
        if self.row:
            row = msgspec.convert(self.row, RowState)
            tensors += [t for t in (row.integers, row.loss_sums, row.noise) if t is not None]
        check_tensors(tensors)


def read_manifest(folder: Path) -> Manifest:
    """Read and check `manifest.json` of one checkpoint.

    Raises:
        CorruptFileError: it is missing, damaged or changed.
        UserError: a checkpoint of another format.
    """
    path = folder / MANIFEST
    try:
        plain = msgspec.json.decode(read_small(path), type=dict[str, Any])
        if (found := msgspec.convert(plain.get("format"), int)) != FORMAT:
            raise UserError(f"checkpoint {folder} has format {found}; this version reads {FORMAT}")
        if not take_seal(plain):
            raise CorruptFileError(
                f"checkpoint manifest {path} is not what was written: it does not match its {SEAL}; "
                "use an earlier one"
            )
        return msgspec.convert(plain, Manifest)
    except OSError as error:
        raise CorruptFileError(f"checkpoint {folder} has no readable {MANIFEST}: {error.strerror}") from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CorruptFileError(f"checkpoint manifest {path} is damaged: {error}") from error


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write and seal `manifest.json` of one checkpoint."""
    write_atomic(folder / MANIFEST, encode_sealed(manifest))


def read_pointer(path: Path) -> Pointer:
    """Read `best.json` or `last.json`.

    Raises:
        CorruptFileError: not what `write_pointer` wrote.
    """
    try:
        return msgspec.json.decode(read_small(path), type=Pointer)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise CorruptFileError(f"{path} is damaged: {error}") from error


def write_pointer(checkpoints: Path, name: Literal["best", "last"], pointer: Pointer) -> None:
    """Make `best.json` or `last.json` in a run's `checkpoints/` name a step."""
    write_json(checkpoints / f"{name}.json", pointer)
