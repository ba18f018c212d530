"""Training steps without images: a run's trainer on batches of noise, its memory and what it launches."""

from __future__ import annotations

import re
import resource
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from data_pipeline.datasets.dataset import Dataset
from data_pipeline.loading.batches import Batch
from train.config.load import make_config
from train.config.schema import RunConfig
from train.distributed.world import World
from train.health.metrics import AccuracyMeter
from train.setup import make_step_parts
from train.step import StepParts, train_step

Step = Callable[[Sequence[Batch], float, int], AccuracyMeter]
"""One optimiser step, see `train.step.train_step`: its micro-batches, the rate, the steps before it."""
LAUNCH = re.compile(r"cu(da)?(LaunchKernel|GraphLaunch|Mem(cpy|set))")  # calls that put work on a GPU


def bench_config(
    variant: str, global_batch: int, crop_px: int, precision: str, device: str, overrides: Sequence[str] = ()
) -> RunConfig:
    """Return the configuration that trains a network on images of `crop_px` pixels."""
    values = {
        "model.name": variant, "model.stem_stride": 4, "preprocessing.crop_px": crop_px,
        "preprocessing.resize_px": crop_px * 8 // 7, "global_batch": global_batch, "precision": precision,
        "device": device, "optimizer.name": "sgd",
    }  # fmt: skip
    return make_config("tiny-imagenet", [*(f"{key}={value}" for key, value in values.items()), *overrides])


def make_noise_parts(config: RunConfig, num_classes: int, world: World) -> StepParts:
    """Build the parts of a run whose data has so many classes and no images."""
    classes = tuple(f"class-{number}" for number in range(num_classes))
    return make_step_parts(config, Dataset(Path(), "train", (), np.zeros(0, np.int64), classes), world, None)


def make_step(parts: StepParts) -> Step:
    """Return the step by which a run with these parts trains."""
    return partial(train_step, parts)


def noise_batch(size: int, crop_px: int, num_classes: int) -> Batch:
    """Return a step's samples without files behind them; the same ones every time."""
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (size, crop_px, crop_px, 3), dtype=np.uint8)
    labels, places = random.integers(0, num_classes, size), np.arange(size)
    return Batch(images, labels, np.ones(size, bool), places, places, (), (), step=0, last=True)


def wait_for(device: torch.device) -> float:
    """Wait until the device has finished its work; return the time in seconds."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def peak_memory_mb(device: torch.device) -> float:
    """Return the peak of memory: on a GPU, what torch held there; on a CPU, what this process held."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def profile_step(step: Callable[[], object], device: torch.device, count: int = 3) -> dict[str, float | None]:
    """Return `count_events` of some steps; torch's profiler slows all that follows in this process."""
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * (device.type == "cuda")]
    with profile(activities=activities) as found:
        for _ in range(count):
            step()
        wait_for(device)
    return count_events(found.key_averages(), device.type, count)


def count_events(events: Iterable[Any], device: str, steps: int) -> dict[str, float | None]:
    """Count the profiler's events of some steps.

    Returns:
        Of one step: `operators` of ATen that the host calls, those inside of others too; `launches`, calls
        that put a kernel, a copy, a fill or a whole graph on the GPU; `kernels` that ran there, copies and
        fills among them; `kernel_ms`, their time. On a CPU the last three are None.
    """
    host, ran = ([e for e in events if e.device_type.name == kind] for kind in ("CPU", "CUDA"))
    ran = [event for event in ran if not event.is_user_annotation]
    found: dict[str, float | None] = {
        "operators": sum(event.count for event in host if event.key.startswith("aten::")) / steps,
        "launches": sum(event.count for event in host if LAUNCH.match(event.key)) / steps,
        "kernels": sum(event.count for event in ran) / steps,
        "kernel_ms": sum(event.self_device_time_total for event in ran) / steps / 1e3,
    }
    return found if device == "cuda" else {**dict.fromkeys(found), "operators": found["operators"]}
