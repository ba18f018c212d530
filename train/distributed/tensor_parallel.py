"""Fully connected layers of which every rank holds a part, so that activations travel and not gradients.

Each rank brings its own samples and gets their logits back. In between, all ranks work on the samples of all:
the first layers hold some of the outputs each (column parallel), the last one some of the inputs (row
parallel).

    features of own samples -> [gather samples] -> FC 6, own units -> [gather units] -> FC 7, own units
    -> FC 8, a part of each sum -> [sum over the ranks, to whom the sample belongs] -> logits of own samples

What is between two layers (ReLU, dropout) is computed where a number has its one owner, before it travels: no
mask is drawn twice for one activation, nor one mask for two.

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
# F features or units of a layer, P of them this rank's part; C classes.


@dataclass
class MicroBatchPlan:
    """What the split layers have to know of one pass: who takes part, and with how many samples.

    Args:
        rows: S, the most samples that any rank brings: all bring as many, the last of them zeros.
        own: N, how many of them are this rank's.
    """

    world: World
    rows: int = 0
    own: int = 0


def part_bounds(size: int, rank: int, world_size: int) -> tuple[int, int]:
    """Where one rank's part begins and ends; the parts are as even as they can be.

    >>> [part_bounds(10, rank, 3) for rank in range(3)]
    [(0, 3), (3, 6), (6, 10)]
    """
    return size * rank // world_size, size * (rank + 1) // world_size


def shard(whole: Tensor, dim: int, world: World) -> Tensor:
    """This rank's part of a tensor along a dimension, a copy."""
    start, stop = part_bounds(whole.shape[dim], world.rank, world.world_size)
    return whole.narrow(dim, start, stop - start).clone()


def gather_shards(part: Tensor, dim: int, size: int, world: World) -> Tensor:
    """What all ranks' parts make together, on every rank: the inverse of `shard`.

    Args:
        part: this rank's.
        dim: along which the whole was sharded.
        size: of the whole along it.
    """
    parts = _gather(_pad_to(part, dim, _most(size, world)), world)
    bounds = [part_bounds(size, rank, world.world_size) for rank in range(world.world_size)]
    return torch.cat([parts[r].narrow(dim, 0, b - a) for r, (a, b) in enumerate(bounds)], dim)


def _most(size: int, world: World) -> int:
    return -(-size // world.world_size)


def _pad_to(tensor: Tensor, dim: int, size: int) -> Tensor:
    """Zeros behind, along one dimension."""
    missing = size - tensor.shape[dim]
    return pad(tensor, (0, 0) * (tensor.ndim - 1 - dim) + (0, missing)) if missing else tensor


def _gather(own: Tensor, world: World) -> Tensor:
    """(…) of each rank -> (K, …), the same on all. Sends (K - 1) times its input."""
    everyones = own.new_empty(world.world_size, *own.shape)
    dist.all_gather(list(everyones.unbind(0)), own.contiguous())
    return everyones


def _sum_to_owners(shares_K: Tensor) -> Tensor:
    """(K, …), what this rank adds to each rank's sum -> (…), this rank's sum. Sends K - 1 of the K.

    All to all, and a sum here: gloo's own reduce-scatter sends twice as much, and a sum in bfloat16 would
    round after each rank.
    """
    received_K = torch.empty_like(shares_K)
    dist.all_to_all_single(received_K, shares_K)
    return received_K.sum(0, dtype=torch.promote_types(shares_K.dtype, torch.float32)).to(shares_K.dtype)


class _GatherSamples(torch.autograd.Function):
    """(S, F) -> (B, F): the samples of all ranks."""

    @staticmethod
    def forward(ctx: Any, own_SF: Tensor, world: World) -> Tensor:
        ctx.world = world
        return _gather(own_SF, world).flatten(0, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad_BF,) = grads
        summed_SF = _sum_to_owners(grad_BF.reshape(ctx.world.world_size, -1, grad_BF.shape[1]))
        # DDP divides the gradients of what lies before by K: see _SumToOwners.
        return summed_SF * ctx.world.world_size, None


class _GatherUnits(torch.autograd.Function):
    """(B, P) -> (B, F): the units of all ranks."""

    @staticmethod
    def forward(ctx: Any, part_BP: Tensor, size: int, world: World) -> Tensor:
        ctx.world = world
        return gather_shards(part_BP, 1, size, world)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        world, (grad_BF,) = ctx.world, grads
        size = grad_BF.shape[1]
        bounds = [part_bounds(size, rank, world.world_size) for rank in range(world.world_size)]
        shares = [_pad_to(grad_BF[:, a:b], 1, _most(size, world)) for a, b in bounds]
        start, stop = bounds[world.rank]
        return _sum_to_owners(torch.stack(shares))[:, : stop - start].contiguous(), None, None


class _SumToOwners(torch.autograd.Function):
    """(B, C), one term of the logits of all samples -> (S, C), the logits of this rank's."""

    @staticmethod
    def forward(ctx: Any, term_BC: Tensor, world: World) -> Tensor:
        ctx.world = world
        return _sum_to_owners(term_BC.reshape(world.world_size, -1, term_BC.shape[1]))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad_SC,) = grads
        # The engine makes each rank's loss K times as large, because DDP divides by K; nobody divides the
        # gradients of a layer that only this rank holds.
        return _gather(grad_SC / ctx.world.world_size, ctx.world).flatten(0, 1), None


class _AddBiasOnce(torch.autograd.Function):
    """Add a bias that every rank holds to one rank's term only; its gradient is the same on all."""

    @staticmethod
    def forward(ctx: Any, term_BC: Tensor, bias_C: Tensor, here: bool) -> Tensor:
        return term_BC + bias_C if here else term_BC.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        (grad_BC,) = grads
        return grad_BC, grad_BC.sum(0), None


class ParallelLinear(nn.Linear):
    """This rank's part of a fully connected layer.

    Args:
        whole: the layer; its parameters are copied in part.
        plan: shared by all split layers of a network.
    Attributes:
        split_dim: dimension of the weight that is split: 0 by outputs, and the bias with it, 1 by inputs.
    """

    split_dim = 0

    def __init__(self, whole: nn.Linear, plan: MicroBatchPlan) -> None:
        super().__init__(whole.in_features, whole.out_features, device="meta")
        self.plan = plan
        self.weight = nn.Parameter(shard(whole.weight.detach(), self.split_dim, plan.world))
        bias = whole.bias.detach()
        self.bias = nn.Parameter(shard(bias, 0, plan.world) if self.split_dim == 0 else bias.clone())

    def unshard(self) -> nn.Linear:
        """The layer with the parts of all ranks; every rank must call this."""
        whole = nn.Linear(self.in_features, self.out_features, device="meta")
        for name, dim, size in self.sharded():
            part = getattr(self, name).detach()
            setattr(whole, name, nn.Parameter(gather_shards(part, dim, size, self.plan.world), False))
        if self.split_dim == 1:
            whole.bias = nn.Parameter(self.bias.detach(), False)
        return whole

    def sharded(self) -> list[tuple[str, int, int]]:
        """Name of each parameter that is split, the dimension, and the size of the whole along it."""
        if self.split_dim == 1:
            return [("weight", 1, self.in_features)]
        return [("weight", 0, self.out_features), ("bias", 0, self.out_features)]


class FirstColumnParallelLinear(ParallelLinear):
    """(N, F) of this rank's samples -> (B, P), this rank's units for the samples of all."""

    def forward(self, input: Tensor) -> Tensor:
        """Gather the samples, in the type in which they are used."""
        kind = input.device.type
        if torch.is_autocast_enabled(kind):
            input = input.to(torch.get_autocast_dtype(kind))
        self.plan.own = len(input)
        gathered_BF: Tensor = _GatherSamples.apply(_pad_to(input, 0, self.plan.rows), self.plan.world)
        return linear(gathered_BF, self.weight, self.bias)


class ColumnParallelLinear(ParallelLinear):
    """(B, P), this rank's units -> (B, P'), this rank's units of the next layer."""

    def forward(self, input: Tensor) -> Tensor:
        """Gather the units."""
        gathered_BF: Tensor = _GatherUnits.apply(input, self.in_features, self.plan.world)
        return linear(gathered_BF, self.weight, self.bias)


class RowParallelLinear(ParallelLinear):
    """(B, P), this rank's units -> (N, C), the logits of this rank's samples, at least in float32."""

    split_dim = 1

    def forward(self, input: Tensor) -> Tensor:
        """Sum over the ranks."""
        term_BC = linear(input, self.weight)
        term_BC = term_BC.to(torch.promote_types(term_BC.dtype, torch.float32))
        term_BC = _AddBiasOnce.apply(term_BC, self.bias, self.plan.world.rank == 0)
        logits_SC: Tensor = _SumToOwners.apply(term_BC, self.plan.world)
        return logits_SC[: self.plan.own]
