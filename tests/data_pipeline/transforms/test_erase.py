"""Random erasing: the boxes are torchvision's, from our stream, on any number of ranks."""

from __future__ import annotations

import math

import numpy as np
import pytest

from data_pipeline.transforms.augment import Augment
from data_pipeline.transforms.erase import erase_boxes_at
from data_pipeline.transforms.rng import uniform_at
from data_pipeline.transforms.sampler import Int, positions_at

HALF = Augment(erase=0.5)


def boxes_at(positions: Int, seed: int = 0, epoch: int = 0, crop_px: int = 224) -> Int:
    boxes = erase_boxes_at(seed, epoch, positions, HALF, crop_px)
    assert boxes is not None and boxes.dtype == np.int64
    return boxes


def torchvision_box(seed: int, epoch: int, position: int, probability: float, crop_px: int) -> list[int]:
    """`RandomErasing`, line by line, with our numbers in the place of its generator's."""

    def draw(stream: int) -> float:
        return float(uniform_at(seed, epoch, position, stream))

    if draw(112) >= probability:
        return [0, 0, 0, 0]
    for first in range(128, 168, 4):
        area = crop_px * crop_px * (0.02 + draw(first) * (0.33 - 0.02))
        ratio = math.exp(math.log(0.3) + draw(first + 1) * (math.log(3.3) - math.log(0.3)))
        h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if not (h < crop_px and w < crop_px):
            continue
        top, left = int(draw(first + 2) * (crop_px - h + 1)), int(draw(first + 3) * (crop_px - w + 1))
        return [top, left, top + h, left + w]
    return [0, 0, 0, 0]


@pytest.mark.parametrize("crop_px", [8, 56])
def test_boxes_are_those_of_torchvision(crop_px: int) -> None:
    boxes = boxes_at(np.arange(500), 3, 2, crop_px)
    assert boxes.tolist() == [torchvision_box(3, 2, position, 0.5, crop_px) for position in range(500)]


def test_half_of_the_samples_are_erased() -> None:
    boxes = boxes_at(np.arange(10_000))
    sides = boxes[:, 2:] - boxes[:, :2]
    assert sides.any(axis=1).sum() == 4990 and boxes.max() == 224 and sides.max() == 223
    shares = sides.prod(axis=1)[sides.any(axis=1)] / 224**2
    assert shares.min() + 1e-3 > 0.02 and shares.max() < 0.331 and abs(shares.mean() - 0.175) < 0.005


def test_nothing_is_erased_unless_configured() -> None:
    assert erase_boxes_at(0, 0, np.arange(4), Augment(), 56) is None


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_boxes_are_equal_on_any_number_of_ranks(world_size: int) -> None:
    whole = boxes_at(positions_at(3, 100, 14, 0, 1)[1])
    shares = [positions_at(3, 100, 14, rank, world_size)[1] for rank in range(world_size)]
    parts = [boxes_at(part) for share in shares for part in np.array_split(share, 2)]
    assert whole.any() and np.array_equal(np.concatenate(parts), whole)
