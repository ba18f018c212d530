"""Cases of `alexnet bench train` that fail at different moments; without torch, so they start at once."""

from __future__ import annotations

import os
from contextlib import ExitStack

from train.bench.subjects import StepSpec


class FailingSteps:
    """Takes half a second; `bn` runs out of memory, `paper` dies in its steps, `owt` in the profiler."""

    def __init__(self, _stack: ExitStack, spec: StepSpec, *_others: object) -> None:
        self.network = spec.network
        if self.network == "bn":
            raise MemoryError("CUDA out of memory.\n Tried to allocate 9 GiB")

    def choice(self) -> dict[str, str]:
        return {}

    def step_s(self, *_counts: int) -> float:
        if self.network == "paper":
            os._exit(3)
        return 0.5

    def start_and_memory(self) -> dict[str, float]:
        return {"first_step_s": 1.0, "peak_memory_mb": 2.0}

    def profile(self) -> dict[str, float]:
        if self.network == "owt":
            raise RuntimeError("no events")
        return {"operators": 5.0}
