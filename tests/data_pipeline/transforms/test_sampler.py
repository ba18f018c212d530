"""The data order: a pure function, with values that must never change."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.common.errors import UserError
from data_pipeline.transforms import sampler
from data_pipeline.transforms.augment import Augment
from data_pipeline.transforms.crop import train_crop_params
from data_pipeline.transforms.preprocessing import Preprocessing
from data_pipeline.transforms.rng import STREAM_BALANCE, hash_at, uniform_at
from data_pipeline.transforms.sampler import (
    class_quotas,
    order_at,
    permutation_at,
    positions_at,
    rank_slice,
    steps_per_epoch,
)

PREPROCESSING = Preprocessing(resize_px=72, crop_px=64)
HASHES = [4966141403971580267, 12598945478509486037, 11314130586898338672]
PERMUTATION = [7, 9, 2, 6, 1, 4, 3, 0, 5, 8]
BALANCED = [8, 9, 3, 7, 2, 6, 5, 0, 7, 9]
UNIFORMS = [0.4016219782876741, 0.8840171655820254, 0.12184649430029793]
WINDOWS = [[17, 80, 208, 262], [90, 23, 288, 230], [2, 2, 55, 45]]
FLIPS = [True, False, True]
OFFSETS = [[2, 32], [2, 7]]

seeds = st.integers(-(2**63), 2**64 - 1)


def test_sample_stream_is_pinned() -> None:
    """A checkpoint resumed with another version of this code must see the same order: never update these."""
    assert hash_at(1234, 5, [0, 1, 2], 3).tolist() == HASHES
    assert permutation_at(7, 2, 10).tolist() == PERMUTATION
    assert uniform_at(42, 0, [0, 1, 10**6], 1).tolist() == UNIFORMS
    sizes = [(375, 500), (500, 375), (64, 64)]
    crops = train_crop_params(sizes, 3, [0, 1, 2], 42, PREPROCESSING, Augment())
    assert crops.windows.tolist() == WINDOWS
    assert crops.flips.tolist() == FLIPS
    paper = train_crop_params([(375, 500), (500, 375)], 3, [0, 1], 42, PREPROCESSING, Augment(crop="random"))
    assert paper.offsets.tolist() == OFFSETS


@given(seed=seeds, epoch=st.integers(0, 1000), num_samples=st.integers(1, 500))
def test_epoch_holds_every_sample_once(seed: int, epoch: int, num_samples: int) -> None:
    assert sorted(permutation_at(seed, epoch, num_samples)) == list(range(num_samples))


@given(counts=st.lists(st.integers(1, 60), min_size=1, max_size=9), balance=st.floats(0, 1))
def test_quotas_are_within_one_of_the_expectation(counts: list[int], balance: float) -> None:
    quotas = class_quotas(np.array(counts), balance)
    powers = np.array(counts) ** (1 - balance)
    expected = sum(counts) * powers / powers.sum()
    assert quotas.sum() == sum(counts)
    assert np.abs(quotas - expected).max() < 1 + 1e-5


def slow_order(seed: int, epoch: int, labels: list[int], balance: float) -> list[int]:
    """`order_at`, one sample after another."""
    quotas = class_quotas(np.bincount(labels), balance).tolist()
    keys = [int(hash_at(seed, epoch, i, STREAM_BALANCE)) >> 24 for i in range(len(labels))]
    repeats = [0] * len(labels)
    for label, quota in enumerate(quotas):
        members = sorted((i for i, one in enumerate(labels) if one == label), key=lambda i: (keys[i], i))
        for turn in range(quota):
            repeats[members[turn % len(members)]] += 1
    drawn = [i for i, count in enumerate(repeats) for _ in range(count)]
    return [drawn[place] for place in permutation_at(seed, epoch, len(labels))]


@pytest.mark.parametrize("balance", [0.0, 0.3, 0.5, 1.0])
def test_balanced_order_is_the_slow_one(balance: float) -> None:
    labels = np.random.default_rng(0).choice(5, size=300, p=[0.6, 0.3, 0.06, 0.02, 0.02]).astype(np.int64)
    assert np.bincount(labels).min() > 1
    orders = [order_at(3, epoch, labels, balance).tolist() for epoch in range(2)]
    assert orders == [slow_order(3, epoch, labels.tolist(), balance) for epoch in range(2)]
    if balance == 0:
        assert orders == [permutation_at(3, epoch, 300).tolist() for epoch in range(2)]
    if balance == 1:
        assert np.bincount(labels[orders[0]]).tolist() == [60] * 5
    # Of a frequent class, another epoch has other samples.
    first, second = ({i for i in order if labels[i] == 0} for order in orders)
    assert (first == second) is (balance == 0)


def test_balanced_order_is_pinned() -> None:
    """As `test_sample_stream_is_pinned`: never update it."""
    assert order_at(7, 2, np.array([0] * 7 + [1] * 3), 1.0).tolist() == BALANCED


@given(count=st.integers(0, 5000), world_size=st.integers(1, 64))
def test_rank_slices_partition_the_batch(count: int, world_size: int) -> None:
    shares = [range(count)[rank_slice(count, rank, world_size)] for rank in range(world_size)]
    assert [i for share in shares for i in share] == list(range(count))
    lengths = [len(share) for share in shares]
    assert max(lengths) - min(lengths) <= 1


@given(data=st.data(), num_samples=st.integers(1, 300), world_size=st.integers(1, 64))
def test_step_has_the_same_samples_on_any_number_of_ranks(
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


def test_global_batch_larger_than_the_data_is_refused() -> None:
    with pytest.raises(UserError, match=r"global_batch 11 is larger than the training set of 10 images"):
        steps_per_epoch(10, 11)
    with pytest.raises(ValueError, match=r"rank 3 is not in 0..2"):
        rank_slice(10, 3, 3)


def test_equal_keys_of_the_order_keep_their_places(monkeypatch: pytest.MonkeyPatch) -> None:
    def two_keys(seed: int, epoch: int, index: npt.NDArray[np.uint64], stream: int) -> npt.NDArray[np.uint64]:
        return index % np.uint64(2)

    monkeypatch.setattr(sampler, "hash_at", two_keys)
    order = permutation_at.__wrapped__(99, 0, 1000)  # not the cached one: that would stay
    assert order.tolist() == [*range(0, 1000, 2), *range(1, 1000, 2)]
