"""Hybrid parallelism's pure functions: the parts of a split layer, the sizes of micro-batches."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.transforms.sampler import rank_slice
from train.distributed.hybrid import samples_of_passes
from train.distributed.tensor_parallel import shard_bounds


@given(st.integers(1, 60), st.integers(1, 7), st.integers(1, 20), st.sampled_from([1, 2]))
def test_passes_of_a_step_are_those_of_every_rank(
    global_batch: int, world_size: int, micro_batch: int, group_size: int
) -> None:
    if global_batch < world_size * group_size or micro_batch < group_size:
        return
    by_rank = samples_of_passes(global_batch, world_size, micro_batch, group_size)
    rows = [max(sizes) for sizes in zip(*by_rank, strict=True)]
    chunk = micro_batch // group_size * group_size
    assert all(0 < n <= chunk for n in rows)
    for rank in range(world_size):
        share = rank_slice(global_batch, rank, world_size, group_size)
        count = share.stop - share.start
        own = [min(chunk, count - first) for first in range(0, count, chunk)]
        assert own and len(own) <= len(rows)
        assert all(mine <= room for mine, room in zip(own, rows[-len(own) :], strict=True))


@given(st.integers(1, 5000), st.integers(1, 64))
def test_part_bounds_partition_and_differ_by_at_most_one(size: int, world_size: int) -> None:
    bounds = [shard_bounds(size, rank, world_size) for rank in range(world_size)]
    assert [a for a, _ in bounds] + [size] == [0] + [b for _, b in bounds]
    sizes = {b - a for a, b in bounds}
    assert max(sizes) - min(sizes) <= 1 and max(sizes) == -(-size // world_size)
