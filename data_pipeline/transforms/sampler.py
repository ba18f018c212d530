"""The data order as a pure function: which samples make up a step, and which of them a rank takes.

Everything here follows from (seed, epoch, position) by arithmetic alone. Ranks, threads and restarts do not
enter, so any step can be computed without the steps before it.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from data_pipeline.common.errors import UserError
from data_pipeline.transforms.rng import STREAM_BALANCE, STREAM_PERMUTATION, hash_at

Int = npt.NDArray[np.int64]

_PARTS = 1 << 20
"""Parts of a sample in which quotas are counted: integers, so that no machine's rounding decides."""
_KEY_BITS = 40
"""Of a sample's random number, below its class in one integer."""


@lru_cache(maxsize=4)
def permutation_at(seed: int, epoch: int, num_samples: int) -> Int:
    """The order of one epoch.

    Args:
        seed: the run's seed.
        epoch: 0-based.
        num_samples: size of the training set.
    Returns:
        (num_samples) int64, read-only: the sample at each position, every sample once.
    """
    keys = hash_at(seed, epoch, np.arange(num_samples, dtype=np.uint64), STREAM_PERMUTATION)
    order = np.argsort(keys).astype(np.int64)  # four times as fast as a stable sort
    ranked = keys[order]
    if (ranked[1:] == ranked[:-1]).any():  # of 64 bits, practically never; equal keys keep their order
        order = np.argsort(keys, kind="stable").astype(np.int64)
    order.setflags(write=False)
    return order


def order_at(seed: int, epoch: int, labels: Int, balance: float) -> Int:
    """The order of one epoch in which rare classes come more often: as many positions as there are samples.

    Each class has its quota (`class_quotas`). Each of its samples comes equally often, or once more than
    others; which ones do is another choice in each epoch. Without balance it is `permutation_at`.

    Args:
        seed: the run's seed.
        epoch: 0-based.
        labels: (N) classes of the samples, 0 or more.
        balance: 0..1, see `class_quotas`.
    Returns:
        (N) int64, read-only: the sample at each position.
    """
    shuffled = permutation_at(seed, epoch, len(labels))
    if balance == 0:
        return shuffled
    counts = np.bincount(labels)
    often, more = np.divmod(class_quotas(counts, balance), np.maximum(counts, 1))
    keys = hash_at(seed, epoch, np.arange(len(labels), dtype=np.uint64), STREAM_BALANCE)
    by_class = np.argsort(
        (labels.astype(np.uint64) << np.uint64(_KEY_BITS)) | (keys >> np.uint64(64 - _KEY_BITS)),
        kind="stable",
    )
    place_in_class = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
    repeats = np.empty(len(labels), dtype=np.int64)
    repeats[by_class] = often[labels[by_class]] + (place_in_class < more[labels[by_class]])
    order = np.repeat(np.arange(len(labels), dtype=np.int64), repeats)[shuffled]
    order.setflags(write=False)
    return order


def class_quotas(counts: Int, balance: float) -> Int:
    """Number of samples of each class in an epoch: exact quotas, whose sum is the number of samples.

    A class of n samples is expected n^(1 - balance) times, in proportion: as often as it is there at 0, as
    often as any other at 1. A quota differs from that by less than 1 (largest remainders; of equal ones,
    that of the first class).

    Args:
        counts: (C) samples of each class.
        balance: 0..1. Above 0 no class may be empty.

    >>> class_quotas(np.array([90, 9, 1]), 0.5).tolist(), class_quotas(np.array([90, 9, 1]), 1.0).tolist()
    ([70, 22, 8], [34, 33, 33])
    """
    if balance == 0:
        return counts
    assert counts.all(), "a class without samples has no quota"
    powers = [math.pow(n, 1 - balance) for n in counts.tolist()]
    total, scale = int(counts.sum()), counts.sum() / math.fsum(powers) * _PARTS
    quotas, remainders = np.divmod(np.array([round(power * scale) for power in powers]), _PARTS)
    largest = np.argsort(-remainders, kind="stable")[: total - int(quotas.sum())]
    quotas[largest] += 1
    return quotas


def rank_slice(count: int, rank: int, world_size: int, group_size: int = 1) -> slice:
    """The contiguous share of one rank; the shares of all ranks, in order, are the whole, even if uneven.

    Args:
        count: number of samples to share.
        rank: which rank, 0..world_size - 1.
        world_size: number of ranks.
        group_size: groups of so many neighbours, from 0 on, are never split: 2 where samples mix in pairs.

    >>> [rank_slice(10, rank, 3) for rank in range(3)]
    [slice(0, 3, None), slice(3, 6, None), slice(6, 10, None)]
    >>> [rank_slice(9, rank, 2, group_size=2) for rank in range(2)]
    [slice(0, 4, None), slice(4, 9, None)]
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} is not in 0..{world_size - 1}")
    groups = -(-count // group_size)
    start, stop = rank * groups // world_size * group_size, (rank + 1) * groups // world_size * group_size
    return slice(min(start, count), min(stop, count))


def steps_per_epoch(num_samples: int, global_batch: int) -> int:
    """Optimiser steps in one epoch; the rest of the order, too short for a batch, is dropped (drop_last).

    Raises:
        UserError: the batch is larger than the training set.
    """
    if global_batch < 1:
        raise UserError(f"global_batch must be at least 1, not {global_batch}")
    if global_batch > num_samples:
        raise UserError(
            f"global_batch {global_batch} is larger than the training set of {num_samples} images: "
            f"set it to {num_samples} or less"
        )
    return num_samples // global_batch


def positions_at(
    step: int, num_samples: int, global_batch: int, rank: int, world_size: int, group_size: int = 1
) -> tuple[int, Int]:
    """The epoch of a step, and the positions in that epoch's order that one rank takes.

    Args:
        step: global step, 0-based, counted through all epochs.
        num_samples: size of the training set.
        global_batch: samples of one step over all ranks.
        rank: which rank, 0..world_size - 1.
        world_size: number of ranks.
        group_size: see `rank_slice`.
    Returns:
        epoch, and (rank_batch) int64 positions in 0..num_samples - 1.
    """
    epoch, step_in_epoch = divmod(step, steps_per_epoch(num_samples, global_batch))
    share = rank_slice(global_batch, rank, world_size, group_size)
    first = step_in_epoch * global_batch
    return epoch, np.arange(first + share.start, first + share.stop, dtype=np.int64)
