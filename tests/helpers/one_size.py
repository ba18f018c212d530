"""Folders whose images have one size, in every kind of file and with bad ones; and batches, compared."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import astuple
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.datasets.dataset import Dataset
from data_pipeline.datasets.open import open_dataset
from data_pipeline.loading.batches import Batch
from data_pipeline.loading.scan import with_table
from data_pipeline.transforms.mix import MixParams
from data_pipeline.transforms.preprocessing import Preprocessing
from data_pipeline.transforms.sampler import Int
from data_pipeline.transforms.trivial import TrivialParams
from tests.helpers.images import BROKEN_KINDS, as_numpy, broken, encode, kinds_of_one_size, photo, suffix_for

PREPROCESSING = Preprocessing(resize_px=36, crop_px=32)
SIZE = (40, 52)
BAD = [kind for kind in BROKEN_KINDS if "30000" not in kind]
NUM_IMAGES = 70


def write_images(folder: Path) -> None:
    """Each kind of file once, each bad one, and photos, in the folders of two classes, one rarer."""
    odd = [*kinds_of_one_size(*SIZE).values(), *(broken(*SIZE)[kind] for kind in BAD)]
    for number in range(NUM_IMAGES):
        image = encode(photo(*SIZE, seed=number), "JPEG", quality=90)
        content = odd[number] if number < len(odd) else image
        path = folder / "ab"[number % 3 == 0] / f"{number:03d}{suffix_for(content)}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def open_images(root: Path) -> Dataset:
    """Write the images of a training split, and look at them."""
    write_images(root / "train")
    return with_table(open_dataset(root, "train"), 1)


def arrays_of(params: MixParams | TrivialParams | Int | None) -> tuple[Any, ...]:
    """The arrays of what a step does to a batch."""
    return astuple(params) if isinstance(params, MixParams | TrivialParams) else (params,)


def count_equal(
    batches: Iterable[Batch],
    others: Iterable[Batch],
    *,
    pixels_of: Callable[[Batch], Any] = lambda batch: batch.images,
    tolerance: int = 0,
) -> tuple[int, int]:
    """Compare two streams of batches, field by field.

    Args:
        pixels_of: the pixels of a batch of the first stream.
        tolerance: levels by which they may differ.
    Returns:
        How many samples there are, and how many of them failed; those are zeros.
    """
    samples = failed = 0
    for one, other in zip_longest(batches, others):
        pixels, expected = as_numpy(pixels_of(one)), as_numpy(other.images)
        assert pixels.shape == expected.shape and np.abs(pixels - expected).max() <= tolerance
        assert not pixels[~one.valid].any() and pixels[one.valid].any(axis=(1, 2, 3)).all()
        for field in ("labels", "valid", "indices", "positions"):
            assert np.array_equal(getattr(one, field), getattr(other, field)), field
        for field in ("failures", "step", "last"):
            assert getattr(one, field) == getattr(other, field), field
        assert list(one.paths) == list(other.paths)
        for field in ("trivial", "erase", "mix"):
            ours, theirs = (arrays_of(getattr(batch, field)) for batch in (one, other))
            assert all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True)), field
        samples, failed = samples + len(one), failed + len(one.failures)
    return samples, failed
