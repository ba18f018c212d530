"""Batches of training crops through a DALI backend, and their pixels."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from data_pipeline.datasets.dataset import Dataset
from data_pipeline.decode.dali import DaliBackend
from data_pipeline.loader import Loader
from data_pipeline.loading.batches import Batch
from data_pipeline.transforms.augment import Augment
from data_pipeline.transforms.preprocessing import Preprocessing
from tests.helpers.images import as_numpy

PREPROCESSING = Preprocessing(resize_px=36, crop_px=32)
STEPS = 12


def train(dataset: Dataset, backend: DaliBackend, num_steps: int = STEPS, **loading: Any) -> list[Batch]:
    loader = Loader(backend, PREPROCESSING, **loading)
    return list(loader.train(dataset, Augment(pca=0.1), seed=5, global_batch=4, num_steps=num_steps))


def pixels(batches: list[Batch]) -> npt.NDArray[np.int64]:
    return np.concatenate([as_numpy(batch.images) for batch in batches])
