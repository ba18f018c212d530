"""The network over all ranks: DistributedDataParallel or hybrid parallelism, as configured."""

from __future__ import annotations

from math import gcd

import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

from data_pipeline.common.errors import UserError
from data_pipeline.transforms.mix import PAIR_SIZE
from train.config.schema import RunConfig
from train.distributed.hybrid import HybridParallel, Parallel, samples_of_passes, wrap_in_ddp
from train.distributed.world import World
from train.models.alexnet import AlexNet
from train.models.batch_norm import synchronize


def micro_batch_size(config: RunConfig, world: World) -> int:
    """Return the most samples that a rank takes through the network at once."""
    rank_batch = -(-config.global_batch // world.world_size)
    return min(config.micro_batch or rank_batch, rank_batch)


def pass_sizes(config: RunConfig, world: World) -> list[int]:
    """Return the most samples that any rank brings to each pass of a step, the same on all ranks."""
    return [max(sizes) for sizes in zip(*passes_of(config, world), strict=True)]


def passes_of(config: RunConfig, world: World) -> list[list[int]]:
    """Return the samples of each rank in each pass of a step, see `samples_of_passes`.

    Raises:
        UserError: images are mixed in pairs, and a rank takes one at a time.
    """
    group_size = PAIR_SIZE if config.augment.mixes else 1
    micro_batch = micro_batch_size(config, world)
    if micro_batch < group_size:
        raise UserError(
            "augment.mixup and cutmix mix images in pairs, and a rank takes one at a time: micro_batch must "
            f"be at least 2, and global_batch, {config.global_batch}, at least twice the number of ranks"
        )
    return samples_of_passes(config.global_batch, world.world_size, micro_batch, group_size)


def check_norm_batch(config: RunConfig, world: World) -> None:
    """Check that statistics can be taken over what batch normalisation is configured to take them over.

    Raises:
        UserError: a rank's share of a pass does not consist of whole ghost batches, with the number that
            would do; or a pass of one sample, whose hidden units have no variance.
    """
    micro_batch, ghost_batch = micro_batch_size(config, world), config.model.norm_batch
    by_rank = passes_of(config, world)
    if ghost_batch is None:
        smallest = min(map(sum, zip(*by_rank, strict=True)))
        if config.model.hidden_norm and smallest < 2:
            raise UserError(
                f"hidden_norm needs two samples in a pass, and with batches of {config.global_batch} and "
                f"micro_batch {micro_batch} one has {smallest}: change either"
            )
        return
    sizes = sorted({size for sizes in by_rank for size in sizes if size})
    if all(size % ghost_batch == 0 for size in sizes):
        return
    common = gcd(*sizes)
    fitting = [number for number in range(2, common + 1) if common % number == 0]
    whole = ghost_batch * world.world_size
    if fitting:
        advice = f"set it to {max((n for n in fitting if n <= ghost_batch), default=fitting[0])}"
    else:
        advice = f"set global_batch to {-(-config.global_batch // whole) * whole}"
        if config.micro_batch:
            advice += f" and micro_batch to {-(-micro_batch // ghost_batch) * ghost_batch}"
    raise UserError(
        f"norm_batch {ghost_batch} does not divide the samples that each of {world.world_size} rank(s) takes "
        f"at once ({', '.join(map(str, sizes))}): {advice}"
    )


def make_parallel(network: AlexNet, config: RunConfig, world: World) -> Parallel:
    """Wrap a network for training on all ranks.

    Under hybrid parallelism this rank keeps its shard of the fully connected layers. With `compress = "bf16"`
    DDP rounds gradients to bfloat16 while they travel; on one rank nothing travels, and nothing is rounded.
    Batch normalisation takes its statistics over all ranks, or over ghost batches.

    Raises:
        UserError: more ranks than hidden units to split, or see `check_norm_batch`.
    """
    if config.model.has_batch_norm:
        check_norm_batch(config, world)
        if world.world_size > 1:
            synchronize(network, world)
    if config.parallel == "hybrid" and world.world_size > 1:
        if config.model.hidden_units < world.world_size:
            raise UserError(
                f"parallel=hybrid splits {config.model.hidden_units} hidden unit(s) over {world.world_size} "
                "ranks: use parallel=ddp"
            )
        return HybridParallel(network, world, pass_sizes(config, world))
    # A static graph wants the first backward pass to be one that reduces gradients; accumulating over
    # micro-batches puts passes without a reduction (`no_sync`) before it.
    parallel = wrap_in_ddp(network, world, static_graph=config.micro_batch is None)
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
