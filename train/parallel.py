"""A network over the ranks, as the configuration has it."""

from __future__ import annotations

from torch.nn.parallel import DistributedDataParallel

from data_pipeline.mix import PAIR
from train.config import RunConfig
from train.distributed import World
from train.hybrid import HybridParallel, Parallel, round_rows
from train.model import AlexNet


def batch_sizes(config: RunConfig, world: World) -> tuple[int, int]:
    """Samples of a step on the rank that has most, and the most that it takes through the network at once."""
    rank_batch = -(-config.global_batch // world.world_size)
    return rank_batch, min(config.micro_batch or rank_batch, rank_batch)


def make_parallel(network: AlexNet, config: RunConfig, world: World) -> Parallel:
    """The network over the ranks; under hybrid parallelism this rank keeps its part of the last layers."""
    _, micro_batch = batch_sizes(config, world)
    if config.parallel == "hybrid" and world.world_size > 1:
        unit = PAIR if config.augment.mixes else 1
        rows = round_rows(config.global_batch, world.world_size, micro_batch, unit)
        return HybridParallel(network, world, rows)
    return DistributedDataParallel(
        network,
        device_ids=[world.local_rank] if world.device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        # its first backward pass must be one that sums: no other may come before it within the step
        static_graph=config.micro_batch is None,
    )
