"""The data order and the crops: pure functions, with values that must never change."""

from __future__ import annotations

import io
import math

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision import transforms

from data_pipeline.common.errors import UserError
from data_pipeline.decode.pillow import PillowBackend
from data_pipeline.transforms.augment import Augment
from data_pipeline.transforms.crop import CROP_TRIES, eval_crop_params, train_crop_params
from data_pipeline.transforms.preprocessing import Preprocessing
from data_pipeline.transforms.rng import STREAM_CROP_TRIES, hash_at, uniform_at
from data_pipeline.transforms.sampler import permutation_at, positions_at, rank_slice, steps_per_epoch
from tests.helpers.images import photo

PREPROCESSING = Preprocessing(resize_px=72, crop_px=64)
AUGMENTS = {
    "random_resized": Augment(),
    "random": Augment(crop="random"),
    "random_square": Augment(crop="random_square"),
    "center": Augment(crop="center"),
}
HASHES = [4966141403971580267, 12598945478509486037, 11314130586898338672]
PERMUTATION = [7, 9, 2, 6, 1, 4, 3, 0, 5, 8]
UNIFORMS = [0.4016219782876741, 0.8840171655820254, 0.12184649430029793]
WINDOWS = [[17, 80, 208, 262], [90, 23, 288, 230], [2, 2, 55, 45]]
FLIPS = [True, False, True]
ANCHORS = [[2, 32], [2, 7]]

seeds = st.integers(-(2**63), 2**64 - 1)
sizes = st.lists(st.tuples(st.integers(1, 3000), st.integers(1, 3000)), min_size=1, max_size=20)


def test_the_stream_is_pinned() -> None:
    """A checkpoint resumed with another version of this code must see the same order: never update these."""
    assert hash_at(1234, 5, [0, 1, 2], 3).tolist() == HASHES
    assert permutation_at(7, 2, 10).tolist() == PERMUTATION
    assert uniform_at(42, 0, [0, 1, 10**6], 1).tolist() == UNIFORMS
    sizes = [(375, 500), (500, 375), (64, 64)]
    crops = train_crop_params(sizes, 3, [0, 1, 2], 42, PREPROCESSING, Augment())
    assert crops.windows.tolist() == WINDOWS
    assert crops.flips.tolist() == FLIPS
    paper = train_crop_params([(375, 500), (500, 375)], 3, [0, 1], 42, PREPROCESSING, AUGMENTS["random"])
    assert paper.offsets.tolist() == ANCHORS


def test_the_hash_is_the_published_one() -> None:
    """Our vectorised mix against plain Python integers."""
    mask = 2**64 - 1

    def mix(z: int) -> int:
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & mask
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB & mask
        return z ^ (z >> 31)

    for inputs in [(0, 0, 0, 0), (2**63, 9, 1_281_166, 55), (-3, 1, 2, 3)]:
        state = 0
        for value in inputs:
            state = mix((state + 0x9E3779B97F4A7C15 * (value + 1)) & mask)
        assert int(hash_at(*inputs)) == state


def test_the_numbers_are_uniform_and_unrelated() -> None:
    draws = uniform_at(0, 0, np.arange(20_000)[:, None], np.arange(6))
    assert abs(draws.mean(axis=0) - 0.5).max() < 0.01
    assert abs(draws.var(axis=0) - 1 / 12).max() < 0.002
    assert abs(np.corrcoef(draws.T) - np.eye(6)).max() < 0.03
    assert draws.min() >= 0 and draws.max() < 1
    assert len({tuple(permutation_at(seed, epoch, 50)) for seed in range(10) for epoch in range(10)}) == 100


@given(seed=seeds, epoch=st.integers(0, 1000), num_samples=st.integers(1, 500))
def test_an_epoch_holds_every_sample_once(seed: int, epoch: int, num_samples: int) -> None:
    assert sorted(permutation_at(seed, epoch, num_samples)) == list(range(num_samples))


@given(count=st.integers(0, 5000), world_size=st.integers(1, 64))
def test_the_ranks_shares_are_the_whole(count: int, world_size: int) -> None:
    shares = [range(count)[rank_slice(count, rank, world_size)] for rank in range(world_size)]
    assert [i for share in shares for i in share] == list(range(count))
    lengths = [len(share) for share in shares]
    assert max(lengths) - min(lengths) <= 1


@given(data=st.data(), num_samples=st.integers(1, 300), world_size=st.integers(1, 64))
def test_a_step_is_the_same_on_any_number_of_ranks(
    data: st.DataObject, num_samples: int, world_size: int
) -> None:
    global_batch = data.draw(st.integers(1, num_samples))
    step = data.draw(st.integers(0, 50))
    epoch, whole = positions_at(step, num_samples, global_batch, 0, 1)
    shares = [positions_at(step, num_samples, global_batch, rank, world_size) for rank in range(world_size)]
    assert {share[0] for share in shares} == {epoch}
    assert np.concatenate([share[1] for share in shares]).tolist() == whole.tolist()
    per_epoch = steps_per_epoch(num_samples, global_batch)
    assert epoch == step // per_epoch
    assert whole.tolist() == [step % per_epoch * global_batch + i for i in range(global_batch)]


@pytest.mark.parametrize("crop", AUGMENTS)
@given(sizes=sizes, seed=seeds)
def test_windows_lie_inside_and_crops_fit(crop: str, sizes: list[tuple[int, int]], seed: int) -> None:
    crops = train_crop_params(sizes, 0, np.arange(len(sizes)), seed, PREPROCESSING, AUGMENTS[crop])
    for recipe in (crops, eval_crop_params(sizes, PREPROCESSING)):
        y, x, h, w = recipe.windows.T
        heights, widths = np.array(sizes).T
        assert (y >= 0).all() and (x >= 0).all() and (h > 0).all() and (w > 0).all()
        assert (y + h <= heights).all() and (x + w <= widths).all()
        assert (recipe.offsets >= 0).all() and (recipe.offsets + 64 <= recipe.sizes).all()
        assert recipe.sizes.max() <= 16 * PREPROCESSING.resize_px


@given(sizes=sizes, seed=seeds, data=st.data())
def test_a_sample_does_not_depend_on_its_neighbours(
    sizes: list[tuple[int, int]], seed: int, data: st.DataObject
) -> None:
    positions = np.arange(100, 100 + len(sizes))
    whole = train_crop_params(sizes, 4, positions, seed, PREPROCESSING, Augment())
    i = data.draw(st.integers(0, len(sizes) - 1))
    alone = train_crop_params([sizes[i]], 4, [100 + i], seed, PREPROCESSING, Augment())
    assert alone.windows[0].tolist() == whole.windows[i].tolist()
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


def test_the_papers_crops_lie_in_the_centre_square() -> None:
    """375 x 500 becomes 72 x 96: the square is columns 12 to 84, in which a crop of 64 has 9 places."""
    augment = AUGMENTS["random_square"]
    cut = train_crop_params([(375, 500)] * 300, 0, np.arange(300), 5, PREPROCESSING, augment)
    assert sorted(set(cut.offsets[:, 0].tolist())) == list(range(9))
    assert sorted(set(cut.offsets[:, 1].tolist())) == list(range(12, 21))
    whole = train_crop_params([(375, 500)] * 300, 0, np.arange(300), 5, PREPROCESSING, AUGMENTS["random"])
    assert sorted(set(whole.offsets[:, 1].tolist())) == list(range(33))


def test_flips_come_as_often_as_asked() -> None:
    positions = np.arange(10_000)
    for flip in (0.0, 0.25, 1.0):
        augment = Augment(crop="center", flip=flip)
        flips = train_crop_params([(64, 64)] * 10_000, 0, positions, 0, PREPROCESSING, augment).flips
        assert abs(flips.mean() - flip) < 0.02
        assert flip not in (0.0, 1.0) or flips.mean() == flip


def test_a_long_strip_is_cut_in_its_middle() -> None:
    crops = eval_crop_params([(2, 5000)], PREPROCESSING)
    assert crops.windows.tolist() == [[0, 2484, 2, 32]]
    assert crops.sizes.tolist() == [[72, 1152]]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"scale": (0.0, 1.0)}, "0 < low <= high <= 1"),
        ({"scale": (0.5, 1.5)}, "0 < low <= high <= 1"),
        ({"ratio": (2.0, 1.0)}, "0 < low <= high"),
        ({"flip": 1.5}, "probability, 0 to 1, not 1.5"),
        ({"flip": float("nan")}, "probability"),
        ({"crop": "centre"}, "Invalid enum value 'centre'"),
    ],
)
def test_augment_says_what_is_allowed(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        msgspec.convert(values, Augment)


def test_a_batch_larger_than_the_data_is_refused() -> None:
    with pytest.raises(UserError, match=r"global_batch 11 is larger than the training set of 10 images"):
        steps_per_epoch(10, 11)
    with pytest.raises(ValueError, match=r"rank 3 is not in 0..2"):
        rank_slice(10, 3, 3)
