"""TrivialAugment: the draws are torchvision's space, from our stream, on any decoder and number of ranks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torchvision.transforms.v2 import TrivialAugmentWide

from data_pipeline.datasets.open import open_dataset
from data_pipeline.decode.dali import DaliBackend
from data_pipeline.decode.pillow import PillowBackend
from data_pipeline.loader import Loader
from data_pipeline.transforms.augment import Augment
from data_pipeline.transforms.preprocessing import Preprocessing
from data_pipeline.transforms.rng import uniform_at
from data_pipeline.transforms.sampler import Int
from data_pipeline.transforms.trivial import NUM_STRENGTHS, Operation, TrivialParams, trivial_params_at
from tests.helpers.images import as_numpy, write_folder
from tests.helpers.reference import trivial_images
from train.inputs.trivial import pack_trivial, trivial_augment

ON = Augment(trivial=True)

PREPROCESSING = Preprocessing(crop_px=64, resize_px=72)


def params_at(positions: Int, seed: int = 0, epoch: int = 0) -> TrivialParams:
    params = trivial_params_at(seed, epoch, positions, ON)
    assert params is not None
    return params


def test_draws_are_from_torchvisions_space() -> None:
    """One sample after another: operation, strength and sign by `TrivialAugmentWide`'s own table."""
    space = list(TrivialAugmentWide._AUGMENTATION_SPACE.items())
    assert [name.lower() for name, _ in space] == [o.name.replace("_", "").lower() for o in Operation]
    params = params_at(np.arange(1000), seed=3, epoch=2)
    for position in range(1000):
        which, strength, sign = (float(uniform_at(3, 2, position, 104 + i)) for i in range(3))
        name, (magnitudes_of, signed) = space[int(which * 14)]
        magnitudes = magnitudes_of(NUM_STRENGTHS, 224, 224)
        expected = 0.0 if magnitudes is None else float(magnitudes[int(strength * NUM_STRENGTHS)])
        if name.startswith("Translate"):
            expected = int(expected + 1e-5)  # whole pixels; one is 15.999999, which is 16
        if name == "Solarize":
            expected *= 255  # torchvision's is a share of the highest level
        if signed and sign < 0.5:
            expected = -expected
        assert params.operations[position] == int(which * 14)
        assert abs(params.magnitudes[position] - expected) < 2e-5, (name, strength)


def test_every_operation_is_as_likely() -> None:
    params = params_at(np.arange(14_000))
    counts = np.bincount(params.operations, minlength=14)
    assert counts.tolist() == [964, 1006, 1031, 957, 960, 1017, 1003, 1012, 1017, 991, 996, 1002, 1042, 1002]
    turns, times = np.unique(params.magnitudes[params.operations == Operation.ROTATE], return_counts=True)
    assert len(turns) == 61 and turns[[0, -1]].tolist() == [-135, 135]
    assert (times[turns < 0].sum(), times[turns > 0].sum()) == (484, 500)


def test_no_operation_unless_configured() -> None:
    assert trivial_params_at(0, 0, np.arange(4), Augment()) is None


def test_batches_of_any_share_bring_what_the_step_does(
    backend: PillowBackend | DaliBackend, tmp_path: Path
) -> None:
    """Decoded images are without it, and then changed as Pillow does."""
    write_folder(tmp_path / "train", {"a": 7, "b": 7})
    loader, dataset = Loader(backend, PREPROCESSING), open_dataset(tmp_path, "train")
    augment = Augment(trivial=True, erase=0.5)
    (whole,) = loader.train(dataset, augment, seed=1, global_batch=14, num_steps=1)
    plain = next(loader.train(dataset, Augment(), seed=1, global_batch=14, num_steps=1))
    assert whole.trivial is not None and whole.erase is not None
    assert plain.trivial is None and plain.erase is None
    assert len(set(whole.trivial.operations)) == 7 and whole.erase.any(axis=1).sum() == 6
    images = as_numpy(whole.images).astype(np.uint8)
    assert np.array_equal(images, as_numpy(plain.images))
    numbers = torch.from_numpy(pack_trivial(whole.trivial, images.shape[1]))
    changed = trivial_augment(torch.from_numpy(images), numbers).numpy()
    assert np.array_equal(changed, trivial_images(images, whole.trivial)) and (changed != images).mean() > 0.3
    seen = 0
    for rank in range(3):
        for batch in loader.train(
            dataset, augment, seed=1, global_batch=14, num_steps=1, rank=rank, world_size=3, micro_batch=2
        ):
            assert batch.trivial is not None and batch.erase is not None
            assert np.array_equal(batch.trivial.operations, whole.trivial.operations[batch.positions])
            assert np.array_equal(batch.trivial.magnitudes, whole.trivial.magnitudes[batch.positions])
            assert np.array_equal(batch.erase, whole.erase[batch.positions])
            seen += len(batch)
    assert seen == 14
