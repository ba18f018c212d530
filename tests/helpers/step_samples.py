"""A small network and a batch of noise, for tests of a training step."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.datasets.dataset import Dataset
from data_pipeline.loading.batches import Batch
from train.checkpoints.load import Checkpoint
from train.config.load import make_config
from train.config.schema import RunConfig
from train.distributed.world import World
from train.setup import make_step_parts
from train.step import StepParts

CLASSES = "abcdefghij"
SMALL = (
    "preprocessing.crop_px=32",
    "preprocessing.resize_px=32",
    "model.stem_stride=1",
    "global_batch=4",
    "cpu_threads=1",
)


def small_trainer(world: World, *overrides: str, checkpoint: Checkpoint | None = None) -> StepParts:
    return parts_of(make_config("tiny-imagenet", [*SMALL, *overrides]), world, checkpoint=checkpoint)


def parts_of(
    config: RunConfig, world: World, *, classes: Sequence[str] = CLASSES, checkpoint: Checkpoint | None = None
) -> StepParts:
    """The parts of a run whose data has these classes and no images."""
    data = Dataset(Path(), "train", (), np.zeros(0, np.int64), tuple(classes))
    return make_step_parts(config, data, world, checkpoint)


def small_batch(*, last: bool = True, **augmentation: Any) -> Batch:
    random, places = np.random.default_rng(0), np.arange(4)
    images = random.integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    return Batch(images, places, np.ones(4, bool), places, places, (), (), step=0, last=last, **augmentation)
