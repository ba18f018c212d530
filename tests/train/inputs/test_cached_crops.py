"""Crops of decoded images, made with torch, against Pillow's, to the bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from data_pipeline.transforms.preprocessing import Preprocessing
from tests.helpers.crops import KINDS, crops_by_pillow, crops_of
from train.inputs import cached_crops
from train.inputs.cached_crops import crop_cached

SIZES = [
    ((64, 64), 64, 56), ((64, 64), 72, 64), ((32, 32), 36, 33), ((48, 61), 24, 19), ((61, 48), 24, 19),
    ((1, 1), 9, 8), ((150, 40), 16, 16),
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("size", "resize_px", "crop_px"), SIZES)
def test_crops_on_a_device_are_pillows(
    kind: str, size: tuple[int, int], resize_px: int, crop_px: int
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (7, *size, 3), np.uint8)
    indices = np.arange(20) * 5 % 7
    crops = crops_of(kind, size, 20, Preprocessing(resize_px=resize_px, crop_px=crop_px))
    images = crop_cached(torch.from_numpy(pixels), indices, crops)
    assert images.dtype == torch.uint8 and images.is_contiguous()
    assert np.array_equal(images.numpy(), crops_by_pillow(pixels, indices, crops))


def test_crops_in_parts_are_those_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of these windows, some are resized by rows first, and in between a part ends."""
    pixels = torch.randint(0, 256, (5, 64, 64, 3), dtype=torch.uint8)
    indices = np.arange(30) % 5
    crops = crops_of("random_resized, colours", (64, 64), 30, Preprocessing(resize_px=64, crop_px=40))
    assert 2 < cached_crops._pack(indices, crops)[1] < 28
    whole = crop_cached(pixels, indices, crops)
    for size in (1, 2, 7):
        monkeypatch.setattr(cached_crops, "_chunk_size", lambda *_, size=size: size)
        assert torch.equal(crop_cached(pixels, indices, crops), whole)


def test_part_of_a_large_batch_needs_little_memory() -> None:
    assert cached_crops._chunk_size((100_000, 64, 64, 3), 56) == 315
    assert cached_crops._chunk_size((10, 4000, 6000, 3), 224) == 1


def test_image_that_is_not_there_is_refused() -> None:
    pixels = torch.zeros((5, 20, 20, 3), dtype=torch.uint8)
    crops = crops_of("center", (20, 20), 2, Preprocessing(resize_px=20, crop_px=16))
    for indices in ((0, 5), (-1, 0)):
        with pytest.raises(AssertionError):
            crop_cached(pixels, np.array(indices), crops)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_crops_on_a_gpu_are_those_on_the_cpu(kind: str) -> None:
    pixels = torch.randint(0, 256, (50, 64, 64, 3), dtype=torch.uint8)
    indices = np.arange(300) % 50
    crops = crops_of(kind, (64, 64), 300, Preprocessing(resize_px=64, crop_px=56))
    expected = crop_cached(pixels, indices, crops)
    on_gpu = pixels.cuda()
    crop_cached(on_gpu, indices, crops)  # libraries wait when they are first used
    torch.cuda.set_sync_debug_mode("error")  # nothing may wait for the device
    try:
        images = crop_cached(on_gpu, indices, crops)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    difference = (images.cpu().int() - expected.int()).abs()
    assert images.device == on_gpu.device
    assert difference.max() <= 1 and difference.float().mean() < 0.001
