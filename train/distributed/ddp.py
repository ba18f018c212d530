"""A network over the ranks, as the configuration has it."""

from __future__ import annotations

import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

from data_pipeline.common.errors import UserError
from data_pipeline.transforms.mix import PAIR_SIZE
from train.config.load import RunConfig
from train.distributed.compression import PLAIN_STEPS, PowerSGD
from train.distributed.hybrid import HybridParallel, Parallel, micro_batch_sizes
from train.distributed.world import World
from train.models.alexnet import AlexNet
from train.optim.precision import Precision

ONE_BUCKET = 1 << 20
"""Megabytes. PowerSGD's hook waits, in gloo's threads, for collectives that need another of them: two buckets
at once would wait for ever, or meet in another order on another rank."""


def batch_sizes(config: RunConfig, world: World) -> tuple[int, int]:
    """Samples of a step on the rank that has most, and the most that it takes through the network at once."""
    rank_batch = -(-config.global_batch // world.world_size)
    return rank_batch, min(config.micro_batch or rank_batch, rank_batch)


def make_parallel(network: AlexNet, config: RunConfig, world: World) -> Parallel:
    """The network over the ranks; under hybrid parallelism this rank keeps its part of the last layers.

    Raises:
        UserError: more ranks than there are units to split.
    """
    _, micro_batch = batch_sizes(config, world)
    if config.parallel == "hybrid" and world.world_size > 1:
        if config.model.hidden_units < world.world_size:
            raise UserError(
                f"parallel=hybrid splits {config.model.hidden_units} hidden unit(s) over {world.world_size} "
                "ranks: use parallel=ddp"
            )
        group_size = PAIR_SIZE if config.augment.mixes else 1
        rows = micro_batch_sizes(config.global_batch, world.world_size, micro_batch, group_size)
        return HybridParallel(network, world, rows)
    return DistributedDataParallel(
        network,
        device_ids=[world.local_rank] if world.device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        # its first backward pass must be one that sums: no other may come before it within the step
        static_graph=config.micro_batch is None,
        bucket_cap_mb=ONE_BUCKET if config.compress == "powersgd" and world.device.type == "cpu" else None,
    )


def compress_gradients(
    parallel: Parallel, config: RunConfig, precision: Precision, step: int
) -> PowerSGD | None:
    """Let gradients travel as `compress` says; called once, before the first step.

    On one rank nothing travels, and nothing is changed.

    Args:
        step: optimiser steps finished. The errors are not in a checkpoint: each rank has its own, of the size
            of all gradients. So a resumed run begins with none, after `PLAIN_STEPS` whole gradients.
    Returns:
        What has to be told of each step; None where nothing is remembered.
    Raises:
        UserError: float16's loss scale changes, and remembered errors would be of another scale.
    """
    if config.compress == "powersgd" and precision.name == "fp16":
        raise UserError(
            "compress=powersgd remembers errors from step to step, and float16's loss scale changes between "
            "them: use precision=bf16 or fp32, or compress=bf16"
        )
    if not isinstance(parallel, DistributedDataParallel) or parallel.process_group.size() == 1:
        return None
    if config.compress == "bf16":
        parallel.register_comm_hook(dist.group.WORLD, default_hooks.bf16_compress_hook)
    if config.compress != "powersgd":
        return None
    return PowerSGD(
        parallel,
        rank=config.powersgd_rank,
        start=config.powersgd_start - step,
        seed=config.seed,
    )


def describe_parallel(config: RunConfig, world: World, step: int) -> str:
    """What travels between the ranks, where it is not plain gradients; for the first lines of a run."""
    chosen = "hybrid" if config.parallel == "hybrid" else f"compress={config.compress}"
    if world.world_size == 1:
        return f"{chosen} on one rank: nothing travels, and nothing is split or compressed"
    if config.parallel == "hybrid":
        return f"hybrid: the fully connected layers are split over {world.world_size} ranks"
    if config.compress == "bf16":
        return "gradients travel in bfloat16"
    if step:
        plain = max(PLAIN_STEPS, config.powersgd_start - step)
        again = f"; a checkpoint has no errors, which begin anew after {plain} whole gradients"
    else:
        again = f", from step {config.powersgd_start + 1} on"
    return f"gradients travel as matrices of rank {config.powersgd_rank} (PowerSGD){again}"
