"""One batch size of a recipe's network: how fast a step is, and what it holds. For `train.tune.batch_size`.

Each size is measured in a process of its own, so that its peak of memory is its own. The command line of this
file is for that process only.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from data_pipeline.datasets.dataset import Dataset
from train.bench.turns import answer_lines
from train.config.schema import RunConfig
from train.distributed.world import cpu_share, open_world
from train.setup import make_step_parts
from train.step import train_step
from train.tune.steps import noise_batch, peak_memory_mb, wait_for


class Fit(msgspec.Struct, frozen=True, kw_only=True):
    """What a size came to; None where it does not fit, and `reason` says why."""

    step_s: list[float] | None
    memory_mb: float | None
    reason: str = ""


def memory_limit_mb(device: str) -> float:
    """How much there is: of a GPU its memory; on a CPU what is free, or left by the control group.

    Source: Linux, Documentation/admin-guide/cgroup-v2.rst, `memory.max`.
    """
    if device == "cuda":
        return torch.cuda.get_device_properties(0).total_memory / 1e6
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    free = next(float(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    for base in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        if (path := Path(base)).is_file() and (text := path.read_text().strip()).isdigit():
            free = min(free, float(text))
    return free / 1e6


def measure(config: RunConfig, num_classes: int, steps: int) -> Fit:
    """Train on a batch of noise, of the configuration's `global_batch`, in one pass.

    Args:
        steps: that are timed, after two that are not.
    """
    with open_world(config.device, config.timeout_s) as world:
        if world.device.type == "cpu":
            torch.set_num_threads(config.cpu_threads or cpu_share(1))
        try:
            classes = tuple(f"class-{number}" for number in range(num_classes))
            nothing = Dataset(Path(), "train", (), np.zeros(0, np.int64), classes)
            trainer = make_step_parts(config, nothing, world, None)
            batch = noise_batch(config.global_batch, config.preprocessing.crop_px, num_classes)
            seconds = []
            for number in range(2 + steps):
                started = wait_for(world.device)
                train_step(trainer, [batch], 0.0, number)
                seconds.append(wait_for(world.device) - started)
            return Fit(step_s=seconds[2:], memory_mb=peak_memory_mb(world.device))
        except (torch.cuda.OutOfMemoryError, MemoryError) as error:
            return Fit(step_s=None, memory_mb=None, reason=str(error).splitlines()[0] or "out of memory")
        except RuntimeError as error:
            if "allocate memory" not in str(error):
                raise
            return Fit(step_s=None, memory_mb=None, reason=str(error).splitlines()[0])


def serve(config: RunConfig, num_classes: int) -> None:
    """Answer a number of steps with a `Fit`."""

    def make() -> Any:
        return lambda words: msgspec.to_builtins(measure(config, num_classes, int(words[0])))

    os.environ.setdefault("OMP_NUM_THREADS", str(cpu_share(1)))
    answer_lines(make)


if __name__ == "__main__":
    serve(msgspec.json.decode(sys.argv[1], type=RunConfig), int(sys.argv[2]))
