"""What a checkpoint may hold: tensors and plain values in their places, no more than the file's own size.

Files come from strangers. Nothing in them is executed, and nothing in them can ask for more memory than they
have bytes.
"""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from data_pipeline.common.errors import CorruptFileError
from data_pipeline.datasets.dataset import Contents
from data_pipeline.transforms.preprocessing import Preprocessing
from train.health.flat_loss import FlatLoss

MAX_PICKLE_BYTES = 1 << 24
"""Of what stands beside the tensors; names of 100,000 classes are a tenth of it."""


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """What a run remembers of its own course.

    Args:
        val_errors: validation error (1 - top-1) after each epoch so far, by which `plateau` lowers the rate.
        flat_loss: how long the training loss has been flat.
    """

    val_errors: tuple[float, ...] = ()
    flat_loss: FlatLoss = FlatLoss()


class OptimizerPart(msgspec.Struct, frozen=True):
    """What `torch.optim.SGD.state_dict` gives."""

    state: dict[int, dict[str, Tensor | None]]
    param_groups: list[dict[str, bool | int | float | list[int] | None]]


class RowPart(msgspec.Struct, frozen=True):
    """What `train.runs.open_row.RunningMetrics.state_dict` gives. Shapes: R ranks."""

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
    """What `state.pt` holds; see `write.State`. What has a default was not in all formats."""

    step: int
    epoch: int
    samples_seen: int
    config: dict[str, Any]
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    model: dict[str, Tensor]
    optimizer: dict[str, Any] = {}
    scaler: dict[str, float] = {}
    average: dict[str, Tensor] = {}
    guard: dict[str, Tensor] = {}
    row: dict[str, Any] = {}
    progress: Progress | None = None
    labels_text: tuple[str, ...] = ()
    data: dict[str, Contents] = {}

    def __post_init__(self) -> None:
        if len(self.labels_text) not in (0, len(self.classes)):
            raise ValueError("it has not a label for each class")
        tensors = [*self.model.values(), *self.average.values(), *self.guard.values()]
        if self.optimizer:
            optimizer = msgspec.convert(self.optimizer, OptimizerPart)
            tensors += [t for state in optimizer.state.values() for t in state.values() if t is not None]
        if self.row:
            row = msgspec.convert(self.row, RowPart)
            tensors += [t for t in (row.integers, row.loss_sums, row.noise) if t is not None]
        check_tensors(tensors)


def load_plain(path: Path) -> Any:
    """Tensors and plain values of a file that `torch.save` wrote. Nothing in it is executed.

    Raises:
        CorruptFileError: it holds anything else, is damaged, or would be larger in memory than on the disk.
    """
    try:
        if zipfile.is_zipfile(path):
            _check_archive(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what is refused here or checked
            return torch.load(path, map_location="cpu", weights_only=True)
    except CorruptFileError:
        raise
    except pickle.UnpicklingError as error:
        raise CorruptFileError(f"{path} holds more than tensors and plain values: not loaded") from error
    except Exception as error:  # a damaged pickle can make its reader raise anything
        raise CorruptFileError(f"{path} cannot be read: {type(error).__name__} {error}"[:300]) from error


def _check_archive(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise CorruptFileError(f"{path} is compressed, as torch never does: not loaded")
    if sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise CorruptFileError(f"{path} holds more than its own size: not loaded")
    beside = [entry for entry in entries if not re.fullmatch(r"[^/]+/data/\d+", entry.filename)]
    pickled = sum(entry.file_size for entry in beside)
    if pickled > MAX_PICKLE_BYTES:
        raise CorruptFileError(
            f"{path} holds {pickled} bytes beside its tensors, more than {MAX_PICKLE_BYTES}: not loaded"
        )


def check_tensors(tensors: Iterable[Tensor]) -> None:
    """Let no tensor be larger than the memory that it was loaded into.

    Raises:
        ValueError: one that repeats its memory, or has none.
    """
    for tensor in tensors:
        if tensor.layout != torch.strided or tensor.device.type != "cpu":
            raise ValueError(f"a tensor is not plain: {tensor.layout}, on {tensor.device}")
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise ValueError(f"a tensor of {tuple(tensor.shape)} has less memory than numbers")
