"""Cases of `alexnet bench train` that fail at different moments, and small ones; they start without torch."""

from __future__ import annotations

import os
import time
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING

from train.bench.subjects import StepSpec

if TYPE_CHECKING:
    from train.bench.trainer import Parts


class FailingSteps:
    """Trains 4 images/s; one network has no memory, others die, take too long or fail in the profiler."""

    def __init__(self, _stack: ExitStack, _device: str, spec: StepSpec, *_others: object) -> None:
        self.network = spec.network
        if self.network == "bn":
            raise MemoryError("CUDA out of memory.\n Tried to allocate 9 GiB")

    def start(self) -> dict[str, float | str]:
        return {"first_step_s": 1.0, "step": "plain", "why": "it is slow"}

    def measure(self, *_counts: int) -> dict[str, float]:
        if self.network == "paper":
            os._exit(3)
        if self.network == "caffe":
            time.sleep(600)
        return {"images_per_s": 4.0}

    def profile(self) -> dict[str, float]:
        if self.network == "owt":
            raise RuntimeError("no events")
        return {"operators": 5.0}


class TwoProducts:
    """Matrix products of a known speed, the second twice as fast."""

    def __init__(self, *_arguments: object) -> None:
        pass

    def measure(self, *_counts: int) -> dict[str, float]:
        return {"gflops_2048": 10.0, "gflops_3072": 20.0}


class NoProducts(TwoProducts):
    """Fails."""

    def measure(self, *_counts: int) -> dict[str, float]:
        raise RuntimeError("no blocks")


def small_gemm_parts(_device: str, _precision: str) -> Parts:
    """A matrix product that takes a hundredth of the time of those that the benchmark measures."""
    import torch

    factor = torch.randn(512, 512)
    return {"gflops_512": (2e-9 * 512**3, partial(torch.mm, factor, factor))}
