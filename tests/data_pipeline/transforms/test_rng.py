"""Random numbers: the published hash, uniform and unrelated."""

from __future__ import annotations

import numpy as np

from data_pipeline.transforms.rng import hash_at, uniform_at
from data_pipeline.transforms.sampler import permutation_at


def test_hash_is_the_published_splitmix64() -> None:
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


def test_random_numbers_are_uniform_and_uncorrelated() -> None:
    draws = uniform_at(0, 0, np.arange(20_000)[:, None], np.arange(6))
    assert abs(draws.mean(axis=0) - 0.5).max() < 0.01
    assert abs(draws.var(axis=0) - 1 / 12).max() < 0.002
    assert abs(np.corrcoef(draws.T) - np.eye(6)).max() < 0.03
    assert draws.min() >= 0 and draws.max() < 1
    assert len({tuple(permutation_at(seed, epoch, 50)) for seed in range(10) for epoch in range(10)}) == 100
