"""A small network and a batch of noise, for tests of a training step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.datasets.dataset import Dataset
from data_pipeline.loading.batches import Batch
from train.checkpoints.load import Checkpoint
from train.config.load import make_config
from train.distributed.world import World
from train.setup import make_step_parts
from train.step import StepParts

SMALL = ("preprocessing.crop_px=32", "preprocessing.resize_px=32", "model.stem_stride=1", "global_batch=4")


def small_trainer(world: World, *overrides: str, checkpoint: Checkpoint | None = None) -> StepParts:
    config = make_config("tiny-imagenet", [*SMALL, *overrides])
    classes = tuple("abcdefghij")
    return make_step_parts(
        config, Dataset(Path(), "train", (), np.zeros(0, np.int64), classes), world, checkpoint
    )


def small_batch(*, last: bool = True, **augmentation: Any) -> Batch:
    random, places = np.random.default_rng(0), np.arange(4)
    images = random.integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    return Batch(images, places, np.ones(4, bool), places, places, (), (), step=0, last=last, **augmentation)
