"""The interface of every runtime, and the check of a batch that they share."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray


class Outputs(NamedTuple):
    """Outputs of a model for n images: probabilities (n, classes), and features (n, length) if asked for."""

    probabilities: NDArray[np.float32]
    features: NDArray[np.float32] | None = None


class InferenceBackend(Protocol):
    """A loaded model. `run` is for one thread at a time; `close` frees what it holds.

    Attributes:
        name: `onnx` or `trt`.
        provider: the library that computes, e.g. `ONNX Runtime 1.31.1 CPUExecutionProvider`.
        device: `cpu`, or the GPU's name.
        precision: of the bundle.
        max_batch: most images that one `run` takes.
    """

    name: str
    provider: str
    device: str
    precision: str
    max_batch: int

    def run(self, images_NHWC: NDArray[np.uint8], *, features: bool = False) -> Outputs:
        """Outputs for uint8 RGB images (n, crop, crop, 3), 1 <= n <= max_batch.

        Args:
            features: whether to give the features, too, of a bundle that has them.
        """

    def run_at(self, address: int, shape: tuple[int, ...], *, features: bool = False) -> Outputs:
        """Like `run`, for contiguous images in the memory of the model's own device."""

    def close(self) -> None:
        """Free what the model holds; a second call does nothing."""


def check_batch(count: int, max_batch: int) -> None:
    """Raise ValueError for a batch that is empty or above the bundle's limit: it is never cut silently."""
    if not 1 <= count <= max_batch:
        raise ValueError(f"a batch of {count}; the model takes 1 to {max_batch}")
