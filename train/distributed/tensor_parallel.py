"""Tensor parallel fully connected layers: activations travel between the ranks, gradients do not.

Each rank brings its own samples and gets their logits back. In between, all ranks work on the samples of all:
each rank holds some of the outputs of the first layers (column parallel), and some of the inputs of the last
one (row parallel).

    features of own samples -> [all-gather samples] -> FC 6, own units -> [all-gather units] -> FC 7, own
    units -> FC 8, a term of each sum -> [reduce-scatter to each sample's rank] -> logits of own samples

ReLU and dropout run on the rank that owns an activation, before the all-gather: one dropout mask per
activation, the one that it has on a single rank.

Source: Krizhevsky 2014, "One weird trick for parallelizing convolutional neural networks", scheme (a);
Shoeybi et al. 2019, "Megatron-LM", section 3 (column and row parallel).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import linear, pad

from train.distributed.world import World

# Shapes: K ranks; S samples that each rank brings, N of them its own and the rest padding; B = K * S;
# F features or units of a layer, P of them this rank's shard; C classes.


@dataclass
class MicroBatchPlan:
    """The samples of one pass through the sharded layers, which all of them share.

    Attributes:
        rows: S, the most samples that any rank brings: all bring as many, padded with zeros.
        own: N, how many of them are this rank's own.
    """

    world: World
    rows: int = 0
    own: int = 0


def shard_bounds(size: int, rank: int, world_size: int) -> tuple[int, int]:
    """Return where one rank's shard begins and ends; the shards are as even as possible.

    >>> [shard_bounds(10, rank, 3) for rank in range(3)]
    [(0, 3), (3, 6), (6, 10)]
    """
    return size * rank // world_size, size * (rank + 1) // world_size


def shard(whole: Tensor, dim: int, world: World) -> Tensor:
    """Copy this rank's shard of a tensor along a dimension."""
    start, stop = shard_bounds(whole.shape[dim], world.rank, world.world_size)
    return whole.narrow(dim, start, stop - start).clone()


def gather_shards(own: Tensor, dim: int, size: int, world: World) -> Tensor:
    """All-gather a sharded tensor, on every rank: the inverse of `shard`.

    Args:
        own: this rank's shard.
        dim: along which the tensor is sharded.
        size: of the whole tensor along it.
    """
    shards = _all_gather(_pad_to(own, dim, _max_shard(size, world)), world)
    bounds = [shard_bounds(size, rank, world.world_size) for rank in range(world.world_size)]
    return torch.cat([shards[r].narrow(dim, 0, b - a) for r, (a, b) in enumerate(bounds)], dim)


def _max_shard(size: int, world: World) -> int:
    return -(-size // world.world_size)


def _pad_to(tensor: Tensor, dim: int, size: int) -> Tensor:
    """Append zeros along one dimension."""
    missing = size - tensor.shape[dim]
    return pad(tensor, (0, 0) * (tensor.ndim - 1 - dim) + (0, missing)) if missing else tensor


def _all_gather(own: Tensor, world: World) -> Tensor:
    """Collect (…) of each rank as (K, …), the same on all. Sends (K - 1) times its input."""
    gathered = own.new_empty(world.world_size, *own.shape)
    dist.all_gather(list(gathered.unbind(0)), own.contiguous())
    return gathered


def _reduce_scatter(shares_K: Tensor) -> Tensor:
    """Sum each rank's share: (K, …), this rank's term for every rank -> (…), its own sum. Sends K - 1 of K.

    An all-to-all and a local sum: gloo's own reduce-scatter sends twice as much, and a sum in bfloat16 would
    round after each rank.
    """
    received_K = torch.empty_like(shares_K)
    dist.all_to_all_single(received_K, shares_K)
    return received_K.sum(0, dtype=torch.promote_types(shares_K.dtype, torch.float32)).to(shares_K.dtype)


def gather_rows(own_N: Tensor, plan: MicroBatchPlan) -> Tensor:
    """All-gather a number of each sample of a pass: (N) of this rank -> (B) of all, zeros for the padding."""
    return _all_gather(_pad_to(own_N, 0, plan.rows), plan.world).flatten()


class _GatherSamples(torch.autograd.Function):
    """All-gather samples: (S, F) of this rank -> (B, F) of all ranks."""

    @staticmethod
    def forward(ctx: Any, own_SF: Tensor, world: World) -> Tensor:
        ctx.world = world
        return _all_gather(own_SF, world).flatten(0, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad_BF,) = grads
        summed_SF = _reduce_scatter(grad_BF.reshape(ctx.world.world_size, -1, grad_BF.shape[1]))
        # DDP divides the gradients of the layers before this one by K: see _SumToOwnRank.
        return summed_SF * ctx.world.world_size, None


class _GatherUnits(torch.autograd.Function):
    """All-gather units: (B, P) of this rank -> (B, F) of all ranks."""

    @staticmethod
    def forward(ctx: Any, own_BP: Tensor, size: int, world: World) -> Tensor:
        ctx.world = world
        return gather_shards(own_BP, 1, size, world)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        world, (grad_BF,) = ctx.world, grads
        size = grad_BF.shape[1]
        bounds = [shard_bounds(size, rank, world.world_size) for rank in range(world.world_size)]
        shares = [_pad_to(grad_BF[:, a:b], 1, _max_shard(size, world)) for a, b in bounds]
        start, stop = bounds[world.rank]
        return _reduce_scatter(torch.stack(shares))[:, : stop - start].contiguous(), None, None


class _SumToOwnRank(torch.autograd.Function):
    """Reduce-scatter logits: (B, C), this rank's term for all samples -> (S, C), sums of its own samples."""

    @staticmethod
    def forward(ctx: Any, term_BC: Tensor, world: World) -> Tensor:
        ctx.world = world
        return _reduce_scatter(term_BC.reshape(world.world_size, -1, term_BC.shape[1]))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad_SC,) = grads
        # `train_step` makes each rank's loss K times as large, because DDP divides by K; nothing divides the
        # gradients of a layer that only this rank holds.
        return _all_gather(grad_SC / ctx.world.world_size, ctx.world).flatten(0, 1), None


class ParallelLinear(nn.Linear):
    """This rank's shard of a fully connected layer.

    Args:
        whole: the layer; this rank's shard of its parameters is copied.
        plan: shared by all sharded layers of a network.
    Attributes:
        shard_dim: along which the weight is sharded: 0 is by outputs, and the bias with it; 1 by inputs.
    """

    shard_dim = 0

    def __init__(self, whole: nn.Linear, plan: MicroBatchPlan) -> None:
        super().__init__(whole.in_features, whole.out_features, device="meta")
        self.plan = plan
        self.weight = nn.Parameter(shard(whole.weight.detach(), self.shard_dim, plan.world))
        bias = whole.bias.detach()
        self.bias = nn.Parameter(shard(bias, 0, plan.world) if self.shard_dim == 0 else bias.clone())

    def unshard(self) -> nn.Linear:
        """Return the whole layer, gathered from all ranks; every rank must call this."""
        whole = nn.Linear(self.in_features, self.out_features, device="meta")
        for name, dim, size in self.sharded_params():
            own = getattr(self, name).detach()
            setattr(whole, name, nn.Parameter(gather_shards(own, dim, size, self.plan.world), False))
        if self.shard_dim == 1:
            whole.bias = nn.Parameter(self.bias.detach(), False)
        return whole

    def sharded_params(self) -> list[tuple[str, int, int]]:
        """Return the name of each sharded parameter, its sharded dimension, and the full size along it."""
        if self.shard_dim == 1:
            return [("weight", 1, self.in_features)]
        return [("weight", 0, self.out_features), ("bias", 0, self.out_features)]


class FirstColumnParallelLinear(ParallelLinear):
    """First layer, by outputs: (N, F) of this rank's samples -> (B, P), this rank's units for all samples."""

    def forward(self, input: Tensor) -> Tensor:
        """Gather the samples, cast first where autocast will cast them: half the bytes travel."""
        kind = input.device.type
        if torch.is_autocast_enabled(kind):
            input = input.to(torch.get_autocast_dtype(kind))
        self.plan.own = len(input)
        gathered_BF: Tensor = _GatherSamples.apply(_pad_to(input, 0, self.plan.rows), self.plan.world)
        return linear(gathered_BF, self.weight, self.bias)


class ColumnParallelLinear(ParallelLinear):
    """Later layer, by outputs: (B, P), this rank's units -> (B, P'), its units of this layer."""

    def forward(self, input: Tensor) -> Tensor:
        """Gather the units of all ranks, and compute this rank's."""
        gathered_BF: Tensor = _GatherUnits.apply(input, self.in_features, self.plan.world)
        return linear(gathered_BF, self.weight, self.bias)


class RowParallelLinear(ParallelLinear):
    """Last layer, by inputs: (B, P), this rank's units -> (N, C), logits of its samples, at least float32."""

    shard_dim = 1

    def forward(self, input: Tensor) -> Tensor:
        """Compute this rank's term of all logits, and sum the terms of all ranks."""
        term_BC = linear(input, self.weight)
        term_BC = term_BC.to(torch.promote_types(term_BC.dtype, torch.float32))
        # Every rank holds the bias; one adds it, the others add zeros that have its gradient.
        bias_C = self.bias if self.plan.world.rank == 0 else self.bias - self.bias.detach()
        logits_SC: Tensor = _SumToOwnRank.apply(term_BC + bias_C, self.plan.world)
        return logits_SC[: self.plan.own]
