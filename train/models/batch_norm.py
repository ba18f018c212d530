"""Batch normalisation whose result does not depend on the number of ranks.

Two ways: over all samples of a pass, on whichever rank they are, or over ghost batches, a fixed number of
consecutive samples of the global batch, of which a rank has whole ones. On one rank the first is torch's own
batch normalisation. In evaluation both are: what normalises then are the running statistics.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm

# Shapes: N samples, C channels or units, ... rows and columns or nothing; K ranks, G ghost batches.


class Ranks(Protocol):
    """The collectives that statistics over several ranks need; `train.distributed.world.World` has them."""

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Return the tensors of all ranks, equal in shape: (K, ...)."""

    def all_reduce(self, *tensors: Tensor) -> None:
        """Replace each tensor by its sum over the ranks."""


class _OverRanks(torch.autograd.Function):
    """Normalises (N, C, ...) by mean and variance of all ranks' samples; a rank may have none.

    Returns:
        The output, and mean (C) and unbiased variance (C) of all ranks, which have no gradient.
    Source: Ioffe & Szegedy 2015, algorithm 1 and section 3; Chan et al. 1979 (means and squares of parts).
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight_C: Tensor, bias_C: Tensor, eps: float, ranks: Ranks
    ) -> tuple[Tensor, Tensor, Tensor]:
        own_3C = weight_C.new_zeros(3, x.shape[1])  # mean, sum of squares about it, count
        if x.numel():
            own_3C[2] = count = x.numel() // x.shape[1]
            # torch's kernel leaves mean and variance in what it would else average them into
            _, variance_C = torch.batch_norm_update_stats(x, own_3C[0], own_3C[1], 1.0)
            own_3C[1] = variance_C * count
        means_KC, squares_KC, counts_KC = ranks.all_gather(own_3C).unbind(1)
        total_C = counts_KC.sum(0)
        mean_C = (counts_KC * means_KC).sum(0) / total_C
        squares_C = (squares_KC + counts_KC * (means_KC - mean_C).square()).sum(0)
        variance_C = squares_C / total_C
        ctx.save_for_backward(x, weight_C, mean_C, variance_C, total_C)
        ctx.eps, ctx.ranks = eps, ranks
        out = batch_norm(x, mean_C, variance_C, weight_C, bias_C, eps=eps) if x.numel() else x.clone()
        unbiased_C = squares_C / (total_C - 1)
        ctx.mark_non_differentiable(mean_C, unbiased_C)
        return out, mean_C, unbiased_C

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        x, weight_C, mean_C, variance_C, total_C = ctx.saved_tensors
        dx, own_2C = torch.zeros_like(x), weight_C.new_zeros(2, x.shape[1])
        if x.numel():  # with constant statistics, and the gradients of weight and bias
            dx, own_2C[0], own_2C[1] = torch.ops.aten.native_batch_norm_backward(
                grads[0], x, weight_C, mean_C, variance_C, None, None, False, ctx.eps, [True] * 3
            )
        sums_2C = own_2C.clone()
        ctx.ranks.all_reduce(sums_2C)
        # and through the mean and the variance, which all ranks share
        weights_C, biases_C = -sums_2C * weight_C * (variance_C + ctx.eps).rsqrt() / total_C
        if x.numel():
            dx = dx + batch_norm(x, mean_C, variance_C, weights_C, biases_C, eps=ctx.eps)
        return dx, own_2C[0], own_2C[1], None, None


class BatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch normalisation of channels or units, with the parameters, names and constants of torch's.

    Args:
        channels: C.
        ghost_batch: samples that have statistics of their own, at least 2; None for those of the whole pass.
            A last ghost batch can be smaller, and counts like the others.
    Attributes:
        ranks: over which a pass's statistics are taken, see `synchronize`; None for this process alone.
        ghost_sums: (2 C + 1), means and variances of the step's ghost batches so far, added up, and their
            number; None where there are none.
    Shape:
        (N, C) or (N, C, H, W) -> the same, same type and memory format; computed in float32.
    Source: Ioffe & Szegedy 2015; Hoffer et al. 2017, algorithm 1 (ghost batches).
    """

    ghost_sums: Tensor | None

    def __init__(self, channels: int, ghost_batch: int | None = None) -> None:
        super().__init__(channels)
        self.ghost_batch = ghost_batch
        self.ranks: Ranks | None = None
        sums = None if ghost_batch is None else torch.zeros(2 * channels + 1)
        self.register_buffer("ghost_sums", sums, persistent=False)

    def _check_input_dim(self, input: Tensor) -> None:
        assert input.ndim in (2, 4)

    def forward(self, input: Tensor) -> Tensor:
        """Normalise; in training also count the statistics in."""
        if self.training and self.ghost_batch is not None:
            return self._over_ghost_batches(input, self.ghost_batch)
        if self.training and self.ranks is not None:
            out: Tensor
            out, mean_C, variance_C = _OverRanks.apply(input, self.weight, self.bias, self.eps, self.ranks)
            self._count_in(mean_C, variance_C)
            return out
        return super().forward(input)

    def _over_ghost_batches(self, x: Tensor, ghost_batch: int) -> Tensor:
        """Run torch's kernel on each ghost batch; mean and variance are what it would else average in."""
        assert self.ghost_sums is not None
        parts = x.split(ghost_batch)  # type: ignore[no-untyped-call]
        statistics_G2C = self.weight.new_zeros(len(parts), 2, x.shape[1])
        out = [
            batch_norm(
                part, mean_C, variance_C, self.weight, self.bias, training=True, momentum=1.0, eps=self.eps
            )
            for part, (mean_C, variance_C) in zip(parts, statistics_G2C, strict=True)
        ]
        self.ghost_sums[:-1] += statistics_G2C.sum(0).flatten()
        self.ghost_sums[-1] += len(parts)
        return torch.cat(out)

    @torch.no_grad()
    def count_ghosts_in(self, sums: Tensor) -> None:
        """Move the running statistics towards the mean of a step's ghost batches, and start the next step.

        Args:
            sums: `ghost_sums`, added up over all ranks.
        """
        assert self.ghost_sums is not None
        self._count_in(*(sums[:-1] / sums[-1]).chunk(2))
        self.ghost_sums.zero_()

    @torch.no_grad()
    def _count_in(self, mean_C: Tensor, variance_C: Tensor) -> None:
        assert self.running_mean is not None and self.running_var is not None and self.momentum is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked += 1
        self.running_mean.lerp_(mean_C, self.momentum)
        self.running_var.lerp_(variance_C, self.momentum)


def synchronize(network: nn.Module, ranks: Ranks) -> None:
    """Take the statistics of each pass over all ranks, which then must all run every pass."""
    for norm in _norms(network):
        if norm.ghost_batch is None:
            norm.ranks = ranks


def is_synchronized(network: nn.Module) -> bool:
    """Whether a pass of the network is one of all ranks together."""
    return any(norm.ranks is not None for norm in _norms(network))


def ghost_sums_of(network: nn.Module) -> Tensor | None:
    """Return the `ghost_sums` of all layers in one tensor, to be added up over the ranks; None without any.

    So running statistics are updated once a step, whatever the ranks and micro-batches, with one collective.
    """
    sums = [norm.ghost_sums for norm in _ghosts(network) if norm.ghost_sums is not None]
    return torch.cat(sums) if sums else None


def settle_ghosts(network: nn.Module, sums: Tensor | None) -> None:
    """Update running statistics by the sum of `ghost_sums_of` over the ranks, in place."""
    ghosts = _ghosts(network)
    if sums is None:
        return
    sizes = [2 * norm.num_features + 1 for norm in ghosts]
    for norm, own in zip(ghosts, sums.split(sizes), strict=True):  # type: ignore[no-untyped-call]
        norm.count_ghosts_in(own)


def _ghosts(network: nn.Module) -> list[BatchNorm]:
    # Frozen norms count nothing in.
    return [norm for norm in _norms(network) if norm.ghost_sums is not None and norm.training]


def _norms(network: nn.Module) -> list[BatchNorm]:
    return [module for module in network.modules() if isinstance(module, BatchNorm)]
