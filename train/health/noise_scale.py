"""The gradient noise scale: up to which size a batch saves steps, from gradients that training makes anyway.

The gradients of a batch's parts scatter more than that of the whole batch, by what tr(S) says, the summed
variance of one sample's gradient. The squared lengths of both together give tr(S) and |G|², the squared
length of the true gradient, each without bias; their ratio is the simple noise scale, in samples.

Source: McCandlish et al. 2018, "An Empirical Model of Large-Batch Training", section 2.2 and appendix A.1.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec
import torch
from torch import Tensor, nn

from train.distributed.world import World

DECAY = 0.98
"""Of the running sums, for each step: they remember about 50 steps."""


class NoiseEstimate(msgspec.Struct, frozen=True, kw_only=True):
    """What some steps say of the gradient.

    Args:
        square: |G|², the squared length of the true gradient; an unbiased estimate can be below 0.
        trace: tr(S), the summed variance of one sample's gradient.
        num_steps: over how many steps.
    """

    square: float
    trace: float
    num_steps: int

    @property
    def scale(self) -> float | None:
        """tr(S) / |G|², in samples; None where |G|² is lost in the noise."""
        return self.trace / self.square if self.square > 0 else None


def estimate_noise(steps: Iterable[Sequence[float]], global_batch: int) -> NoiseEstimate | None:
    """The two-batch-size estimator over several steps.

    With a batch of B samples in n parts of b_i, s_i the sum of a part's gradients and s that of all:
    E[sum |s_i|²/b_i] = B |G|² + n tr(S), and E[|s|²/B] = B |G|² + tr(S).

    Args:
        steps: for each, sum |s_i|²/b_i over its parts; the number of parts; that of samples; and |s|² divided
            by global_batch², which is the squared length of the gradient that the optimiser sees.
        global_batch: what the gradient was divided by.
    Returns:
        The estimate; None of no steps.
    Source: McCandlish et al. 2018, appendix A.1, for parts that need not be of one size.

    >>> estimate_noise([(30.0, 2, 4, 5.0)], global_batch=4)
    NoiseEstimate(square=2.5, trace=10.0, num_steps=1)
    """
    difference = spare_parts = whole = samples = 0.0
    count = 0
    for parts_sum, num_parts, num_samples, square in steps:
        step_whole = square * global_batch**2 / num_samples
        difference += parts_sum - step_whole
        spare_parts += num_parts - 1
        whole += step_whole
        samples += num_samples
        count += 1
    if spare_parts == 0:
        return None
    trace = difference / spare_parts
    return NoiseEstimate(square=(whole - count * trace) / samples, trace=trace, num_steps=count)


def smooth_noise(before: NoiseEstimate | None, new: NoiseEstimate) -> NoiseEstimate:
    """Running sums of both parts, weighted by steps and forgetting old ones; their ratio is what to read.

    A mean of ratios would be biased, and a ratio of means is not moved by how few steps there were so far.

    Args:
        before: the sums so far; None at the start.
        new: of the steps since.

    >>> first, second = (NoiseEstimate(square=s, trace=t, num_steps=1) for s, t in ((1.0, 80.0), (9.0, 0.0)))
    >>> round(smooth_noise(smooth_noise(None, first), second).scale, 2)
    7.86
    """
    keep = DECAY**new.num_steps
    old = before or NoiseEstimate(square=0.0, trace=0.0, num_steps=0)
    return NoiseEstimate(
        square=keep * old.square + (1 - keep) * new.square,
        trace=keep * old.trace + (1 - keep) * new.trace,
        num_steps=old.num_steps + new.num_steps,
    )


class NoiseMeter:
    """Squared lengths of gradients, part by part and as a whole; nothing waits for the device until `read`.

    A part is what passes through the network at once: a rank's micro-batch. Its gradient is seen on its way
    into `.grad`, before it is added to others or travels, and is not copied.

    Args:
        network: all of whose parameters every rank holds whole.
        world: the ranks that share a batch.
        global_batch: samples of a step; the loss is divided by it.
    """

    def __init__(self, network: nn.Module, world: World, global_batch: int) -> None:
        self.world, self.global_batch = world, global_batch
        self._squares: list[Tensor] = []  # of one parameter's gradient each, in this part
        self._parts: list[Tensor] = []
        self._steps: list[Tensor] = []
        for parameter in network.parameters():
            parameter.register_hook(self._see)  # type: ignore[no-untyped-call]

    def _see(self, gradient: Tensor) -> None:
        self._squares.append(_square(gradient))

    def start_part(self) -> None:
        """Forget what was seen: a backward pass that counts comes next."""
        self._squares.clear()

    def end_part(self, valid_N: Tensor) -> None:
        """Close a part after its backward pass.

        Args:
            valid_N: which of its samples count.
        """
        square, num_samples = torch.stack(self._squares).sum(), valid_N.sum()
        is_part = num_samples > 0
        share = torch.where(is_part, square / num_samples, 0.0)
        self._parts.append(torch.stack([share, is_part.double(), num_samples.double()]))

    def end_step(self, gradients: Sequence[Tensor], loss_scale: Tensor, skip: Tensor) -> None:
        """Close a step once its gradient is the sum over all ranks.

        Args:
            gradients: free of any loss scale.
            loss_scale: by which the parts' were multiplied.
            skip: 1 where the step is not taken, and does not count here.
        """
        factor = self.global_batch / (self.world.world_size * loss_scale.double())
        share, num_parts, num_samples = torch.stack(self._parts).sum(0)
        square = torch.stack([_square(gradient) for gradient in gradients]).sum()
        row = torch.stack([share * factor**2, num_parts, num_samples, square, skip.double()])
        self._steps.append(row)
        self._parts.clear()

    def unread(self) -> Tensor:
        """What this rank knows of the steps since `read`, for `load` to go on with: float64 (steps, 5)."""
        return torch.stack(self._steps) if self._steps else torch.zeros(0, 5, dtype=torch.float64)

    def load(self, ranks: Tensor) -> None:
        """Go on from what every rank knew, with the same or another number of ranks.

        Args:
            ranks: `unread` of each, (world_size then, steps, 5).
        """
        mine = ranks[min(self.world.rank, len(ranks) - 1)].clone()
        if len(ranks) != self.world.world_size:  # parts add up over the ranks; the rest is the same on all
            mine[:, :3] = ranks[:, :, :3].sum(0) if self.world.is_main else 0.0
        self._steps = list(mine.to(self.world.device))

    def read(self) -> NoiseEstimate | None:
        """The estimate of the steps since the last call. Waits for the device; every rank must call it.

        Returns:
            The same on every rank; None where every step was skipped.
        """
        rows, self._steps = torch.stack(self._steps), []
        kept = rows[:, 4] == 0
        # A skipped step's parts can be anything; its place stays, so that the ranks add up alike.
        ranks = torch.where(kept[:, None], rows[:, :3], 0.0)
        self.world.all_reduce(ranks)
        return estimate_noise(
            (
                [*parts, square]
                for parts, square, keep in zip(
                    ranks.tolist(), rows[:, 3].tolist(), kept.tolist(), strict=True
                )
                if keep
            ),
            self.global_batch,
        )


def _square(gradient: Tensor) -> Tensor:
    """Squared length, float64 ().

    Row by row: over 17 million numbers at once, a float32 sum on a CPU comes out 0.1% too small.
    """
    rows = gradient.flatten(1) if gradient.ndim > 1 else gradient
    lengths: Tensor = torch.linalg.vector_norm(rows, dim=-1)
    return lengths.double().square().sum()
