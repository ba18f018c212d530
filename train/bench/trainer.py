"""Training steps without images: a run's trainer on batches of noise, timed, with its memory."""

from __future__ import annotations

import resource
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from data_pipeline.datasets.dataset import Dataset
from data_pipeline.loading.batches import Batch
from train.config.load import make_config
from train.config.schema import RunConfig
from train.distributed.world import World
from train.setup import make_step_parts
from train.step import StepParts


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
