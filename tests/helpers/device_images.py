"""Images that lie on a GPU, as far as code can see; their memory is the host's, so that a CPU can run it."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from data_pipeline.loader import Loader
from data_pipeline.loading.batches import Batch


class DeviceImages:
    """Stands in for DALI's `TensorGPU`: NumPy may not touch it, and `as_cpu` copies it."""

    def __init__(self, pixels: NDArray[np.uint8]) -> None:
        self._pixels = np.ascontiguousarray(pixels)
        self.__cuda_array_interface__ = {"version": 3}
        self.num_copies = 0

    def __dlpack__(self, **options: object) -> object:
        raise BufferError("Unsupported device in DLTensor.")

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, 0  # kDLCUDA

    def __array__(self, *arguments: object, **options: object) -> NDArray[np.uint8]:
        raise TypeError("Implicit conversion to a NumPy array is not allowed.")

    def as_cpu(self) -> NDArray[np.uint8]:
        self.num_copies += 1
        return self._pixels.copy()

    def shape(self) -> list[int]:
        return list(self._pixels.shape)

    def data_ptr(self) -> int:
        return self._pixels.ctypes.data


def put_images_on_device(monkeypatch: pytest.MonkeyPatch) -> list[DeviceImages]:
    """Let every loader give such images. Returns those that it gave, as they come."""
    given: list[DeviceImages] = []

    def wrap(batches: Any) -> Generator[Batch, None, None]:
        try:
            for batch in batches:
                given.append(DeviceImages(np.asarray(batch.images)))
                yield replace(batch, images=given[-1])
        finally:
            batches.close()

    for name in ("eval", "predict"):
        method = getattr(Loader, name)
        monkeypatch.setattr(
            Loader, name, lambda self, *a, _method=method, **options: wrap(_method(self, *a, **options))
        )
    return given
