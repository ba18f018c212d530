"""Training steps without images: a run's trainer on batches of noise, its memory and what it launches."""

from __future__ import annotations

import re
import resource
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from data_pipeline.datasets.dataset import Dataset
from data_pipeline.loading.batches import Batch
from train.config.load import make_config
from train.config.schema import RunConfig
from train.distributed.world import World
from train.graphs.choose import WORTH_IMAGES, Course, open_step
from train.graphs.verdict import FILE, Record, read_record
from train.setup import make_step_parts
from train.step import StepFn, StepParts, train_step

LEARNING_RATE = 1e-3
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


@dataclass(frozen=True)
class ChosenStep:
    """The step by which a run trains.

    Attributes:
        run: takes one optimiser step.
        record: which kind of step it is, and why.
        seconds: that the choice took; with a proof, most of a cold start.
    """

    run: StepFn
    record: Record
    seconds: float


def make_step(parts: StepParts, sample: Batch) -> ChosenStep:
    """Choose the step by which a long run with these parts trains, as the run itself would.

    A proof is read from the user's cache and kept there, as in training: its key holds all that decides which
    kernels run and on which shapes, the network's layers among it. The state of `parts` stays what it is.

    Args:
        sample: a step's samples, which a fast step is proved on.
    """
    started = time.perf_counter()
    with TemporaryDirectory() as folder:
        course = Course(num_images=WORTH_IMAGES, rate=LEARNING_RATE, step=0, folder=Path(folder))
        step, _ = open_step(parts, partial(train_step, parts), course, iter([[sample]]))
        record = read_record(Path(folder) / FILE)
    assert record is not None
    return ChosenStep(step, record, time.perf_counter() - started)


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
