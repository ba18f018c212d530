"""Loads files of `torch.save` from untrusted sources.

Nothing in such a file is executed, and nothing in it can allocate more memory than the file has bytes.
"""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from data_pipeline.common.errors import CorruptFileError

MAX_PICKLE_BYTES = 1 << 24
"""Most bytes beside the tensors; the names of 100,000 classes take a tenth of it."""
MAX_FOREIGN_NAMES = 500
"""Most classes and functions that are skipped in one file; a trainer's state names a few dozen."""
_RUNS_CODE = re.compile(
    r"(builtins|_?io)\.(__import__|compile|eval|exec|open)"
    r"|(commands|subprocess)\.(Popen|call|check_call|check_output|getoutput|getstatusoutput|run)"
    r"|(ctypes|importlib|pty|runpy|shutil|socket)\..*"
)
"""Names that no trainer's state has; `commands` is what pickle writes for `subprocess`.

None is called in any case: a file with one is an attack on whoever loads it elsewhere.
"""


class Skipped:
    """Stands for an object of a foreign class, of which nothing was loaded.

    Attributes:
        name: the class or function that would have made it.
    """

    name = ""

    def __new__(cls, *_arguments: object) -> Skipped:
        return super().__new__(cls)

    def __setstate__(self, _state: object) -> None:
        """Forget the state."""


class _SkippedDict:
    """Stands for a subclass of dict: its items are kept, in a plain one."""

    def __new__(cls, *_arguments: object) -> OrderedDict[Any, Any]:  # type: ignore[misc]
        return OrderedDict()


class _SkippedList:
    """Stands for a subclass of list."""

    def __new__(cls, *_arguments: object) -> list[Any]:  # type: ignore[misc]
        return []


def load_plain(path: Path, *, skipping: bool = False) -> Any:
    """Load the tensors and plain values of a file that `torch.save` wrote, without executing anything in it.

    Args:
        skipping: put a `Skipped` in place of each object of a foreign class, which is never imported. So a
            state dict can be read that lies beside the arguments of its trainer.
    Raises:
        CorruptFileError: it holds anything else, is damaged, or would be larger in memory than on the disk;
            where objects are skipped, if it names functions that run code, as attacks do.
    """
    try:
        is_archive = zipfile.is_zipfile(path)
        if is_archive:
            _check_archive(path)
        # Files of torch before 1.6 are no archives: those hold plain values, or are refused.
        stand_ins = safe_globals(_stand_ins(path)) if skipping and is_archive else nullcontext()
        with stand_ins, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of kinds of tensors that are refused afterwards
            return torch.load(path, map_location="cpu", weights_only=True)
    except CorruptFileError:
        raise
    except pickle.UnpicklingError as error:
        raise CorruptFileError(f"{path} holds more than tensors and plain values: not loaded") from error
    except Exception as error:  # a damaged pickle can make its reader raise anything
        reason = " ".join(f"{type(error).__name__} {error}".split())  # torch's own may have many lines
        raise CorruptFileError(f"{path} cannot be read: {reason}"[:300]) from error


def _stand_ins(path: Path) -> list[Any]:
    """Stand-ins for the classes and functions that torch's reader does not know, by their names.

    The names come from the file's instructions; an unlisted one, and those of modules that torch blocks, are
    still refused when the file is loaded.
    """
    names = sorted(get_unsafe_globals_in_checkpoint(path))
    if len(names) > MAX_FOREIGN_NAMES:
        raise CorruptFileError(f"{path} names {len(names)} classes that are not torch's: not loaded")
    if attack := next(filter(_RUNS_CODE.fullmatch, names), None):
        raise CorruptFileError(f"{path} holds more than tensors and plain values ({attack}): not loaded")
    return [(_stand_in(name), name) for name in names]


def _stand_in(name: str) -> type:
    last = name.rpartition(".")[2].lower()
    if last.endswith("dict"):  # AttributeDict, defaultdict, ...
        return _SkippedDict
    if last in ("deque", "list"):
        return _SkippedList
    return type("Skipped", (Skipped,), {"name": name})


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
