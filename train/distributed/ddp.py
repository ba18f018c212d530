"""The network over all ranks: DistributedDataParallel or hybrid parallelism, as configured."""

from __future__ import annotations

import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

from data_pipeline.common.errors import UserError
from data_pipeline.transforms.mix import PAIR_SIZE
from train.config.schema import RunConfig
from train.distributed.hybrid import HybridParallel, Parallel, micro_batch_sizes
from train.distributed.world import World
from train.models.alexnet import AlexNet


def rank_batch_size(config: RunConfig, world: World) -> int:
    """Return the samples of a step on the rank that has most."""
    return -(-config.global_batch // world.world_size)


def micro_batch_size(config: RunConfig, world: World) -> int:
    """Return the most samples that a rank takes through the network at once."""
    rank_batch = rank_batch_size(config, world)
    return min(config.micro_batch or rank_batch, rank_batch)


def make_parallel(network: AlexNet, config: RunConfig, world: World) -> Parallel:
    """Wrap a network for training on all ranks.

    Under hybrid parallelism this rank keeps its shard of the fully connected layers. With `compress = "bf16"`
    DDP rounds gradients to bfloat16 while they travel; on one rank nothing travels, and nothing is rounded.

    Raises:
        UserError: more ranks than hidden units to split.
    """
    if config.parallel == "hybrid" and world.world_size > 1:
        if config.model.hidden_units < world.world_size:
            raise UserError(
                f"parallel=hybrid splits {config.model.hidden_units} hidden unit(s) over {world.world_size} "
                "ranks: use parallel=ddp"
            )
        group_size = PAIR_SIZE if config.augment.mixes else 1
        micro_batch = micro_batch_size(config, world)
        sizes = micro_batch_sizes(config.global_batch, world.world_size, micro_batch, group_size)
        return HybridParallel(network, world, sizes)
    parallel = DistributedDataParallel(
        network,
        device_ids=[world.local_rank] if world.device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        # A static graph wants the first backward pass to be one that reduces gradients; accumulating over
        # micro-batches puts passes without a reduction (`no_sync`) before it.
        static_graph=config.micro_batch is None,
    )
    if config.compress == "bf16" and world.world_size > 1:
        parallel.register_comm_hook(dist.group.WORLD, default_hooks.bf16_compress_hook)
    return parallel


def describe_parallel(config: RunConfig, world: World) -> str:
    """Describe what travels between the ranks, where it is not plain gradients; for a run's first lines."""
    if world.world_size == 1:
        chosen = "hybrid" if config.parallel == "hybrid" else f"compress={config.compress}"
        return f"{chosen} on one rank: nothing travels, and nothing is split or compressed"
    if config.parallel == "hybrid":
        return f"hybrid: the fully connected layers are split over {world.world_size} ranks"
    return "gradients travel in bfloat16"
