"""Several small arrays in one run of bytes: they reach a device in one copy, and can be static there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

ALIGNMENT = 16
"""Bytes: every array begins at a multiple of this."""

Arrays = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Field:
    """Where an array lies, from one byte up to another, and its type and shape."""

    name: str
    start: int
    stop: int
    dtype: torch.dtype
    shape: tuple[int, ...]


Layout = tuple[Field, ...]
"""Equal for arrays of equal names, types and shapes; hashable."""


def layout_of(arrays: Arrays) -> Layout:
    """Lay arrays out one after another.

    >>> [field.start for field in layout_of({"a": np.zeros(3, np.int32), "b": np.zeros(2, bool)})]
    [0, 16]
    """
    fields: list[Field] = []
    for name, array in arrays.items():
        start = -(-fields[-1].stop // ALIGNMENT) * ALIGNMENT if fields else 0
        stop = start + array.nbytes
        fields.append(Field(name, start, stop, torch.from_numpy(array).dtype, array.shape))
    return tuple(fields)


def pack(arrays: Arrays, layout: Layout) -> Tensor:
    """Return the arrays as bytes on the host, uint8 (size,).

    Args:
        layout: `layout_of` these arrays.
    """
    packed = np.zeros(layout[-1].stop, dtype=np.uint8)
    for field in layout:
        array = np.ascontiguousarray(arrays[field.name])
        packed[field.start : field.stop] = array.reshape(-1).view(np.uint8)
    return torch.from_numpy(packed)


def unpack(packed: Tensor, layout: Layout) -> dict[str, Tensor]:
    """Return the arrays as views of the bytes of `pack`, which may be on a device by now."""
    return {
        field.name: packed[field.start : field.stop].view(field.dtype).view(field.shape) for field in layout
    }


def tensor_to_device(values: npt.NDArray[Any] | Tensor, device: torch.device) -> Tensor:
    """Return an array as a tensor on a device, without waiting for the copy if there is one."""
    tensor = torch.as_tensor(values)
    return tensor if tensor.device == device else tensor.pin_memory().to(device, non_blocking=True)


def place(arrays: Arrays, device: torch.device) -> dict[str, Tensor]:
    """Return arrays as tensors on a device, by one copy, without waiting for it."""
    layout = layout_of(arrays)
    return unpack(tensor_to_device(pack(arrays, layout), device), layout)


class StaticArrays:
    """Arrays on a device whose memory stays where it is, for what is captured once and replayed.

    Args:
        arrays: of the names, types and shapes that are written.
    Attributes:
        tensors: by name; nothing is in them before the first `write`.
    """

    def __init__(self, arrays: Arrays, device: torch.device) -> None:
        self._layout = layout_of(arrays)
        self._packed = torch.empty_like(pack(arrays, self._layout), device=device)
        self.tensors = unpack(self._packed, self._layout)

    def write(self, arrays: Arrays) -> None:
        """Write arrays over those of before, by one copy, without waiting for it."""
        packed = pack(arrays, self._layout)
        on_host = self._packed.device == packed.device
        self._packed.copy_(packed if on_host else packed.pin_memory(), non_blocking=True)
