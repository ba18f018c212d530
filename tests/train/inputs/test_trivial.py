"""TrivialAugment on the device: Pillow's pixels, for every operation, strength and sign."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from data_pipeline.transforms.trivial import Operation, TrivialParams, _tabulate
from tests.helpers.images import photo
from tests.helpers.reference import trivial_image, trivial_images
from train.inputs.trivial import pack_trivial, trivial_augment

Images = npt.NDArray[np.uint8]


def every_operation() -> TrivialParams:
    """All operations with all their magnitudes, of both signs."""
    table_OB = _tabulate()
    pairs = {
        (int(operation), float(sign * magnitude))
        for operation in Operation
        for magnitude in table_OB[operation]
        for sign in ((1, -1) if Operation.SHEAR_X <= operation <= Operation.SHARPNESS else (1,))
    }
    operations, magnitudes = zip(*sorted(pairs), strict=True)
    return TrivialParams(np.array(operations), np.array(magnitudes))


EVERY = every_operation()


def augmented(images_NSS3: Tensor, params: TrivialParams) -> Tensor:
    numbers_KN = torch.from_numpy(pack_trivial(params, images_NSS3.shape[1]))
    return trivial_augment(images_NSS3, numbers_KN)


def photos(side: int) -> Images:
    """A dull one and a bright one in turn, and noise."""
    random = np.random.default_rng(0)
    sharp = [np.asarray(photo(side, side, seed=i)) for i in range(7)]
    noise = random.integers(0, 256, (side, side, 3), dtype=np.uint8)
    kinds = np.stack([*(image // 3 + 20 * i for i, image in enumerate(sharp)), *sharp, noise])
    return kinds[np.arange(len(EVERY)) % len(kinds)].astype(np.uint8)


@pytest.mark.parametrize("side", [24, 33])
def test_every_operation_gives_pillows_pixels(side: int) -> None:
    images = photos(side)
    assert len(EVERY) == 1 + 9 * 61 + 7 + 31 + 2
    changed = augmented(torch.from_numpy(images), EVERY).numpy()
    expected = trivial_images(images, EVERY)
    differing = (changed != expected).any(axis=(1, 2, 3))
    assert not differing.any(), [Operation(o).name for o in np.unique(EVERY.operations[differing])]
    assert (changed != images).any(axis=(1, 2, 3)).mean() > 0.9


def test_images_of_few_levels_give_pillows_pixels() -> None:
    """No range to stretch, no histogram to make even, and the ends of the levels."""
    levels = [(0, 0), (255, 255), (128, 128), (0, 255), (100, 101), (254, 255)]
    flat = np.empty((len(levels), 16, 16, 3), dtype=np.uint8)
    for image, (low, high) in zip(flat, levels, strict=True):
        image[:], image[3:9, 5:] = low, high
    flat[-1, ..., 0] = 7  # one channel of three
    some = ((12, 0), (13, 0), (9, 0.99), (9, -0.99), (11, 255), (11, 0), (8, 0.99), (8, -0.99), (10, 2))
    for operation, magnitude in some:
        params = TrivialParams(np.full(len(flat), operation), np.full(len(flat), float(magnitude)))
        changed = augmented(torch.from_numpy(flat), params).numpy()
        assert np.array_equal(changed, trivial_images(flat, params)), Operation(operation).name


def test_torchvisions_tensors_give_nearly_the_same() -> None:
    """A level in blends and stretches, which it rounds otherwise; a few pixels of a rotation, in float32."""
    images = photos(24)
    changed = augmented(torch.from_numpy(images), EVERY)
    turned = 0.0
    for before, after, operation, magnitude in zip(
        images, changed, EVERY.operations, EVERY.magnitudes, strict=True
    ):
        image = torch.from_numpy(before).permute(2, 0, 1)
        distance = (trivial_image(image, operation, magnitude).permute(1, 2, 0).int() - after.int()).abs()
        if operation == Operation.ROTATE:
            turned += float((distance.amax(-1) > 0).float().mean()) / 61
        else:
            rounded = operation in (Operation.COLOR, Operation.CONTRAST, Operation.AUTOCONTRAST)
            assert distance.max() <= int(rounded), (Operation(operation).name, magnitude)
    assert 0 < turned < 0.002


@pytest.mark.gpu
def test_operations_on_a_gpu_are_those_on_the_cpu() -> None:
    images = torch.from_numpy(photos(33))
    expected = augmented(images, EVERY)
    on_gpu = images.cuda()
    augmented(on_gpu, EVERY)  # libraries wait when they are first used
    torch.cuda.set_sync_debug_mode("error")  # nothing may wait for the device
    try:
        changed = augmented(on_gpu, EVERY)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert changed.device == on_gpu.device and torch.equal(changed.cpu(), expected)


def test_pixels_are_the_same_where_bits_must_repeat() -> None:
    images = torch.from_numpy(photos(16))
    want = augmented(images, EVERY)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.equal(augmented(images, EVERY), want)
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert not torch.equal(want, images)
