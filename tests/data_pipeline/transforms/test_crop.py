"""Crops: inside the image, those of torchvision, and independent of a sample's neighbours."""

from __future__ import annotations

import io
import math

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision import transforms
from torchvision.transforms import v2

from data_pipeline.decode.dali import DaliBackend
from data_pipeline.decode.pillow import PillowBackend
from data_pipeline.transforms.augment import Augment
from data_pipeline.transforms.crop import (
    CROP_TRIES,
    CropParams,
    eval_crop_params,
    padding_px,
    ten_crop_params,
    train_crop_params,
)
from data_pipeline.transforms.preprocessing import Preprocessing
from data_pipeline.transforms.rng import STREAM_CROP_TRIES, uniform_at
from tests.helpers.crops import AUGMENTS as VIVID
from tests.helpers.images import as_numpy, encode, photo
from tests.helpers.reference import apply_colors

PREPROCESSING = Preprocessing(resize_px=72, crop_px=64)

AUGMENTS = {
    "random_resized": Augment(),
    "random": Augment(crop="random"),
    "random_square": Augment(crop="random_square"),
    "padded": Augment(crop="padded"),
    "center": Augment(crop="center"),
}
FILES = [encode(photo(90, 120, seed=i), "PNG") for i in range(6)]
SIZES = [(90, 120)] * len(FILES)
# Those from the third on are resized for a short side of 64; the last one is a strip.
NOT_SQUARE = [photo(*size) for size in ((64, 64), (64, 85), (90, 120), (51, 37), (3, 2), (700, 2))]
WHOLE = Preprocessing(resize_px=64, crop_px=64)

seeds = st.integers(-(2**63), 2**64 - 1)

sizes = st.lists(st.tuples(st.integers(1, 3000), st.integers(1, 3000)), min_size=1, max_size=20)


@pytest.mark.parametrize("crop", AUGMENTS)
@given(sizes=sizes, seed=seeds)
def test_crop_windows_lie_inside_the_image(crop: str, sizes: list[tuple[int, int]], seed: int) -> None:
    crops = train_crop_params(sizes, 0, np.arange(len(sizes)), seed, PREPROCESSING, AUGMENTS[crop])
    for recipe in (crops, eval_crop_params(sizes, PREPROCESSING)):
        y, x, h, w = recipe.windows.T
        heights, widths = np.array(sizes).T
        assert (y >= 0).all() and (x >= 0).all() and (h > 0).all() and (w > 0).all()
        assert (y + h <= heights).all() and (x + w <= widths).all()
        border = 8 if recipe is crops and crop == "padded" else 0
        assert (recipe.offsets >= -border).all() and (recipe.offsets + 64 <= recipe.sizes + border).all()
        assert recipe.sizes.max() <= 16 * PREPROCESSING.resize_px


@given(sizes=sizes, seed=seeds, data=st.data())
def test_crop_of_a_sample_does_not_depend_on_its_neighbours(
    sizes: list[tuple[int, int]], seed: int, data: st.DataObject
) -> None:
    positions = np.arange(100, 100 + len(sizes))
    augment = AUGMENTS[data.draw(st.sampled_from(sorted(AUGMENTS)))]
    whole = train_crop_params(sizes, 4, positions, seed, PREPROCESSING, augment)
    i = data.draw(st.integers(0, len(sizes) - 1))
    alone = train_crop_params([sizes[i]], 4, [100 + i], seed, PREPROCESSING, augment)
    assert alone.windows[0].tolist() == whole.windows[i].tolist()
    assert alone.offsets[0].tolist() == whole.offsets[i].tolist()
    assert alone.flips[0] == whole.flips[i]


def random_resized_crop(height: int, width: int, draws: list[list[float]]) -> list[int]:
    """`RandomResizedCrop.get_params` of torchvision, word for word, with our numbers in place of its own."""
    log_ratio = math.log(3 / 4), math.log(4 / 3)
    for area, ratio, y, x in draws:
        target_area = height * width * (0.08 + area * (1.0 - 0.08))
        aspect_ratio = math.exp(log_ratio[0] + ratio * (log_ratio[1] - log_ratio[0]))
        w = round(math.sqrt(target_area * aspect_ratio))
        h = round(math.sqrt(target_area / aspect_ratio))
        if 0 < w <= width and 0 < h <= height:
            return [int(y * (height - h + 1)), int(x * (width - w + 1)), h, w]
    in_ratio = width / height
    if in_ratio < 3 / 4:
        w, h = width, round(width / (3 / 4))
    elif in_ratio > 4 / 3:
        w, h = round(height * (4 / 3)), height
    else:
        w, h = width, height
    return [(height - h) // 2, (width - w) // 2, h, w]


@given(sizes=sizes, seed=seeds)
def test_random_resized_crops_are_torchvisions(sizes: list[tuple[int, int]], seed: int) -> None:
    crops = train_crop_params(sizes, 1, np.arange(len(sizes)), seed, PREPROCESSING, Augment())
    streams = STREAM_CROP_TRIES + np.arange(4 * CROP_TRIES)
    for i, (height, width) in enumerate(sizes):
        draws = uniform_at(seed, 1, i, streams).reshape(CROP_TRIES, 4).tolist()
        assert crops.windows[i].tolist() == random_resized_crop(height, width, draws)


@given(
    height=st.integers(20, 320), width=st.integers(20, 320), crop=st.integers(8, 64), more=st.integers(0, 30)
)
@settings(max_examples=60, deadline=None)
def test_evaluation_crops_are_torchvisions_to_the_pixel(
    height: int, width: int, crop: int, more: int
) -> None:
    preprocessing = Preprocessing(resize_px=crop + more, crop_px=crop)
    image = photo(height, width)
    expected = transforms.CenterCrop(crop)(transforms.Resize(crop + more)(image))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=0)
    backend = PillowBackend(num_threads=1, max_batch=1)
    decoded = backend.decode([buffer.getvalue()], eval_crop_params([(height, width)], preprocessing))
    backend.close()
    images = decoded.images
    assert isinstance(images, np.ndarray)
    assert np.array_equal(images[0], np.asarray(expected))


def test_paper_crops_lie_in_the_centre_square() -> None:
    """375 x 500 becomes 72 x 96: the square is columns 12 to 84, in which a crop of 64 has 9 places."""
    augment = AUGMENTS["random_square"]
    cut = train_crop_params([(375, 500)] * 300, 0, np.arange(300), 5, PREPROCESSING, augment)
    assert sorted(set(cut.offsets[:, 0].tolist())) == list(range(9))
    assert sorted(set(cut.offsets[:, 1].tolist())) == list(range(12, 21))
    whole = train_crop_params([(375, 500)] * 300, 0, np.arange(300), 5, PREPROCESSING, AUGMENTS["random"])
    assert sorted(set(whole.offsets[:, 1].tolist())) == list(range(33))


def test_padded_crops_begin_at_every_place_of_the_border() -> None:
    """A square of 64 in one of 64 with 8 more on each side; 56 in 72 x 96 with 7."""
    cut = train_crop_params([(64, 64)] * 2000, 0, np.arange(2000), 5, WHOLE, AUGMENTS["padded"])
    for axis in (0, 1):
        places, counts = np.unique(cut.offsets[:, axis], return_counts=True)
        assert places.tolist() == list(range(-8, 9))
        assert abs(counts / 2000 - 1 / 17).max() < 0.02
    smaller = Preprocessing(resize_px=72, crop_px=56)
    cut = train_crop_params([(375, 500)] * 2000, 0, np.arange(2000), 5, smaller, AUGMENTS["padded"])
    assert sorted(set(cut.offsets[:, 0].tolist())) == list(range(-7, 24))
    assert sorted(set(cut.offsets[:, 1].tolist())) == list(range(-7, 48))


def padded_crop(image: Image.Image, crops: CropParams, index: int) -> npt.NDArray[np.uint8]:
    """As torchvision's `RandomCrop` with padding: a border with NumPy, then a part of it."""
    (y, x, h, w), (height, width) = crops.windows[index].tolist(), crops.sizes[index].tolist()
    window = image.crop((x, y, x + w, y + h)).resize((width, height), Image.Resampling.BILINEAR)
    border = padding_px(crops.crop_px)
    padded = np.pad(np.asarray(window), ((border, border), (border, border), (0, 0)))
    top, left = (crops.offsets[index] + border).tolist()
    crop = padded[top : top + crops.crop_px, left : left + crops.crop_px]
    return crop[:, ::-1] if crops.flips[index] else crop


def assert_pixels(
    backend: PillowBackend | DaliBackend,
    images: object,
    expected: npt.NDArray[np.uint8],
    colors: bool = False,
) -> None:
    """To the bit; but DALI's own resize repeats the edge, and colours are rounded in another order."""
    difference = np.abs(as_numpy(images) - expected)
    resizes = isinstance(backend, DaliBackend) and backend.max_batch_bytes is not None
    assert difference[:2].max() <= colors and difference[2:].max() <= (32 if resizes else colors)
    assert difference.mean() < 0.5


@pytest.mark.parametrize("kind", ["padded", "padded, colours"])
def test_padded_crops_are_those_of_a_padded_image(kind: str, backend: PillowBackend | DaliBackend) -> None:
    """And of each image at every corner; with colours, the border changes them like all else."""
    files = [encode(image, "PNG") for image in NOT_SQUARE]
    sizes = [(image.height, image.width) for image in NOT_SQUARE]
    for epoch in range(4):
        crops = train_crop_params(sizes, epoch, range(6), 3, WHOLE, VIVID[kind])
        expected = np.stack([padded_crop(image, crops, i) for i, image in enumerate(NOT_SQUARE)])
        black = (expected == 0).all(axis=-1)
        assert black.any(axis=(1, 2)).all()
        images = backend.decode(files, crops).images
        if crops.colors is not None:
            expected = apply_colors(expected, crops.colors)
            assert (as_numpy(images)[black] != 0).any()
        assert_pixels(backend, images, expected, colors=crops.colors is not None)


def test_ten_views_of_all_of_an_image_are_padded(backend: PillowBackend | DaliBackend) -> None:
    """Ten that differ, where there were two; in the middle is the crop of evaluation."""
    view = transforms.Compose(
        [transforms.Resize(64), transforms.Pad(8), transforms.CenterCrop(80), transforms.TenCrop(64)]
    )
    images, sizes = NOT_SQUARE[:5], [(image.height, image.width) for image in NOT_SQUARE[:5]]
    expected = np.stack([np.stack([np.asarray(crop) for crop in view(image)]) for image in images])
    files, crops = [encode(image, "PNG") for image in images], ten_crop_params(sizes, WHOLE)
    decoded = backend.decode(files, crops).images
    assert_pixels(backend, decoded, expected)
    for views in as_numpy(decoded):
        assert len({one.tobytes() for one in views}) == 10
    assert np.array_equal(crops.offsets[:, 4], eval_crop_params(sizes, WHOLE).offsets)


def test_flips_have_the_configured_probability() -> None:
    positions = np.arange(10_000)
    for flip in (0.0, 0.25, 1.0):
        augment = Augment(crop="center", flip=flip)
        flips = train_crop_params([(64, 64)] * 10_000, 0, positions, 0, PREPROCESSING, augment).flips
        assert abs(flips.mean() - flip) < 0.02
        assert flip not in (0.0, 1.0) or flips.mean() == flip


def test_crop_of_a_long_strip_is_its_middle() -> None:
    crops = eval_crop_params([(2, 5000)], PREPROCESSING)
    assert crops.windows.tolist() == [[0, 2484, 2, 32]]
    assert crops.sizes.tolist() == [[72, 1152]]


def test_ten_crop_views_are_torchvisions(backend: PillowBackend | DaliBackend) -> None:
    images = as_numpy(backend.decode(FILES, ten_crop_params(SIZES, PREPROCESSING)).images)
    assert images.shape == (6, 10, 64, 64, 3)
    wide = PillowBackend(max_batch=16, num_threads=1)
    square = Preprocessing(crop_px=72, resize_px=72)
    middle = as_numpy(
        wide.decode(
            FILES, train_crop_params(SIZES, 0, range(6), 0, square, Augment(crop="center", flip=0))
        ).images
    )
    wide.close()
    for views, one in zip(images, middle, strict=True):
        expected = v2.TenCrop(64)(torch.from_numpy(one.astype(np.uint8)).permute(2, 0, 1))
        for view, crop in zip(views, expected, strict=True):
            difference = np.abs(view - crop.permute(1, 2, 0).numpy().astype(int))
            assert difference[1:-1, 1:-1].max() <= 1
