"""Loads files of `torch.save` from untrusted sources.

Nothing in such a file is executed, and nothing in it can allocate more memory than the file has bytes.
"""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_pipeline.common.errors import CorruptFileError

MAX_PICKLE_BYTES = 1 << 24
"""Most bytes beside the tensors; the names of 100,000 classes take a tenth of it."""


def load_plain(path: Path) -> Any:
    """Load the tensors and plain values of a file that `torch.save` wrote, without executing anything in it.

    Raises:
        CorruptFileError: it holds anything else, is damaged, or would be larger in memory than on the disk.
    """
    try:
        if zipfile.is_zipfile(path):
            _check_archive(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of kinds of tensors that are refused afterwards
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
    pickled = sum(e.file_size for e in entries if not re.fullmatch(r"[^/]+/data/\d+", e.filename))
    if pickled > MAX_PICKLE_BYTES:
        raise CorruptFileError(
            f"{path} holds {pickled} bytes beside its tensors, more than {MAX_PICKLE_BYTES}: not loaded"
        )


def check_tensors(tensors: Iterable[Tensor]) -> None:
    """Refuse tensors that are larger than the memory they were loaded into.

    Raises:
        ValueError: a tensor that repeats its memory, or has none.
    """
    for tensor in tensors:
        if tensor.layout != torch.strided or tensor.device.type != "cpu":
            raise ValueError(f"a tensor is not plain: {tensor.layout}, on {tensor.device}")
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise ValueError(f"a tensor of {tuple(tensor.shape)} has less memory than numbers")
