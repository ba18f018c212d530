"""MixUp and CutMix: against NumPy, and on any number of ranks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.transforms.augment import Augment
from data_pipeline.transforms.mix import beta_quantile, mix_params_at
from data_pipeline.transforms.sampler import positions_at, rank_slice
from tests.helpers.reference import mix_images, mix_labels
from tests.helpers.stem_samples import mix_on_device
from train.inputs.mixup import average_views, mix_inputs, mixed_losses

BOTH = Augment(mixup=0.4, cutmix=1.0, mix_probability=0.8)


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 200), st.integers(1, 64))
def test_mixing_pairs_stay_on_one_rank(global_batch: int, world_size: int) -> None:
    shares = [rank_slice(global_batch, rank, world_size, 2) for rank in range(world_size)]
    assert [i for s in shares for i in range(s.start, s.stop)] == list(range(global_batch))
    assert all(s.start % 2 == 0 or s.start == global_batch for s in shares)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_mix_params_are_equal_on_any_number_of_ranks(world_size: int) -> None:
    whole = mix_params_at(5, 0, positions_at(3, 100, 14, 0, 1)[1], BOTH, 64)
    assert whole is not None
    weights, boxes = [], []
    for rank in range(world_size):
        plan = mix_params_at(5, 0, positions_at(3, 100, 14, rank, world_size, 2)[1], BOTH, 64)
        assert plan is not None
        weights.append(plan.label_weights)
        boxes.append(plan.boxes)
    assert np.array_equal(np.concatenate(weights), whole.label_weights)
    assert np.array_equal(np.concatenate(boxes), whole.boxes)


def test_mixing_on_the_device_matches_the_reference() -> None:
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (40, 64, 64, 3), dtype=np.uint8)
    labels = random.integers(0, 10, 40)
    plan = mix_params_at(5, 0, np.arange(40), BOTH, 64)
    assert plan is not None and 0 < (plan.boxes.any(axis=1)).sum() < 40 and (plan.label_weights == 1).any()
    inputs = torch.from_numpy(images).float().permute(0, 3, 1, 2)
    on_device = mix_on_device(plan)
    mixed = mix_inputs(inputs, on_device)
    assert mixed.is_contiguous(memory_format=torch.channels_last)
    assert np.abs(mixed.permute(0, 2, 3, 1).numpy() - mix_images(images, plan)).max() < 1e-4
    logits = torch.from_numpy(random.normal(size=(40, 10)).astype(np.float32))
    soft = torch.from_numpy(mix_labels(labels, plan, 10))
    expected = -(soft * logits.log_softmax(1)).sum(1)
    ours = mixed_losses(logits, torch.from_numpy(labels), on_device)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    even = 0.9 * soft + 0.1 / 10
    expected = -(even * logits.log_softmax(1)).sum(1)
    ours = mixed_losses(logits, torch.from_numpy(labels), on_device, label_smoothing=0.1)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    weights = torch.linspace(0.1, 2, 10)
    expected = -(even * weights * logits.log_softmax(1)).sum(1)
    ours = mixed_losses(logits, torch.from_numpy(labels), on_device, 0.1, weights)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_unreadable_samples_are_not_mixed_in() -> None:
    plan = mix_params_at(5, 0, np.arange(8), Augment(mixup=1.0), 64)
    assert plan is not None
    valid = np.ones(8, dtype=bool)
    valid[3] = False
    left = plan.drop_invalid(valid)
    assert left.partners.tolist() == [1, 0, 2, 3, 5, 4, 7, 6]
    assert left.weights[2:4].tolist() == left.label_weights[2:4].tolist() == [1, 1]
    assert np.array_equal(left.weights[4:], plan.weights[4:])


@pytest.mark.parametrize("alpha", [0.4, 1.0, 2.0])
def test_mixup_weights_follow_the_beta_distribution(alpha: float) -> None:
    drawn = beta_quantile((np.arange(100_000) + 0.5) / 100_000, alpha)
    assert abs(drawn.mean() - 0.5) < 1e-3
    assert abs(drawn.var() - 1 / (4 * (2 * alpha + 1))) < 1e-3


def test_views_are_averaged_as_probabilities() -> None:
    logits = torch.randn(30, 7, generator=torch.Generator().manual_seed(0))
    expected = logits.softmax(1).reshape(3, 10, 7).mean(1)
    torch.testing.assert_close(average_views(logits, 10).softmax(1), expected)
