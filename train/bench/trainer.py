"""Training steps without images: a run's trainer on noise, its arithmetic, its memory, what it launches."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from data_pipeline.common.machine import resident_mb
from data_pipeline.datasets.dataset import Dataset
from data_pipeline.loading.batches import Batch
from train.bench.harness import time_calls
from train.bench.subjects import StepSpec
from train.config.load import make_config
from train.config.schema import RunConfig
from train.distributed.world import World
from train.graphs.choose import WORTH_IMAGES, Course, open_step
from train.graphs.verdict import FILE, Record, read_record
from train.models.alexnet import make_model
from train.setup import make_step_parts
from train.step import StepFn, StepParts, train_step

NUM_CLASSES = 1000
LEARNING_RATE = 1e-3
GEMM_SIDES = {"cpu": (2048, 3072), "cuda": (4096, 8192)}
GEMM_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
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


def make_step(parts: StepParts, sample: Batch) -> tuple[StepFn, Record]:
    """Choose the step by which a long run with these parts trains, as the run itself would.

    A proof is read from the user's cache and kept there, as in training: its key holds all that decides which
    kernels run and on which shapes, the network's layers among it. The state of `parts` stays what it is.

    Args:
        sample: a step's samples, which a fast step is proved on.
    Returns:
        What takes one optimiser step; which kind of step that is, and why.
    """
    with TemporaryDirectory() as folder:
        course = Course(num_images=WORTH_IMAGES, rate=LEARNING_RATE, step=0, folder=Path(folder))
        step, _ = open_step(parts, partial(train_step, parts), course, iter([[sample]]))
        record = read_record(Path(folder) / FILE)
    assert record is not None
    return step, record


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
    return resident_mb(peak=True)


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


def count_flops(model: nn.Module, crop_px: int) -> int:
    """Count an image's forward and backward pass: two operations for each multiply-add.

    Of convolutions and linear layers; the update of the weights is 1/100 of them. Counted on the meta device:
    torch's own counter ignores a backward pass's groups.

    Args:
        model: any network of convolutions and linear layers, (N, 3, crop_px, crop_px) in; it keeps the hooks.
    """
    counted: list[int] = []

    def count(module: nn.Module, _inputs: Any, output: Tensor) -> None:
        assert isinstance(module.weight, Tensor)
        counted.append(2 * module.weight.numel() * math.prod(output.shape[2:]))

    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.register_forward_hook(count)
    model(torch.empty(1, 3, crop_px, crop_px, device="meta"))
    # Gradients of weights and of inputs; the first layer's input is the image, which needs none.
    return 3 * sum(counted) - counted[0]


def flops_of(spec: StepSpec, crop_px: int) -> int:
    """Count a case's network; normalisations are not counted."""
    with torch.device("meta"):
        if spec.network == "torchvision":
            from torchvision.models import alexnet

            return count_flops(alexnet(num_classes=NUM_CLASSES), crop_px)
        model = bench_config(spec.network, spec.batch, crop_px, "fp32", "cpu").model
        return count_flops(make_model(model, num_classes=NUM_CLASSES, crop_px=crop_px), crop_px)


def gemm_gflops(precision: str, device: str) -> float:
    """Measure a few square matrix products; return the fastest, in 1e9 operations a second."""
    fastest = 0.0
    for side in GEMM_SIDES[device]:
        a, b = (torch.randn(side, side, device=device).to(GEMM_TYPES[precision]) for _ in range(2))
        _first, *others = time_calls(partial(torch.mm, a, b), 4, partial(wait_for, a.device))
        fastest = max(fastest, 2 * side**3 / min(others))
    return fastest / 1e9
