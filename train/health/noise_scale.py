"""The gradient noise scale: the batch size up to which larger batches save steps, from training's gradients.

The gradients of a batch's parts vary more than that of the whole batch, in proportion to tr(S), the summed
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
"""Decay of the running sums for each step, which average about 50 steps."""


class NoiseEstimate(msgspec.Struct, frozen=True, kw_only=True):
    """Estimates of the gradient's length and variance over some steps.

    Attributes:
        square: |G|², the squared length of the true gradient; an unbiased estimate can be below 0.
        trace: tr(S), the summed variance of one sample's gradient.
        num_steps: number of steps.
    """

    square: float
    trace: float
    num_steps: int

    @property
    def scale(self) -> float | None:
        """tr(S) / |G|², in samples; None if |G|² is lost in the noise."""
        return self.trace / self.square if self.square > 0 else None


def estimate_noise(steps: Iterable[Sequence[float]], global_batch: int) -> NoiseEstimate | None:
    """Estimate the noise with the two-batch-size estimator over several steps.

    With a batch of B samples in n parts of b_i, s_i the sum of a part's gradients and s that of all:
    E[sum |s_i|²/b_i] = B |G|² + n tr(S), and E[|s|²/B] = B |G|² + tr(S).

    Args:
        steps: for each, sum |s_i|²/b_i over its parts; the number of parts; that of samples; and |s|² divided
            by global_batch², which is the squared length of the gradient that the optimiser sees.
        global_batch: divisor of the gradient.
    Returns:
        The estimate; None without any step.
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
    """Update the exponential moving averages of both estimates, weighted by steps; use their ratio.

    A mean of ratios would be biased; a ratio of means does not depend on how few steps there were so far.

    Args:
        before: the averages so far; None at the start.
        new: estimate of the steps since.

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
    """Measures squared lengths of gradients, of parts and of the whole batch.

    A part is one rank's micro-batch. A hook sees its gradient before it is accumulated into `.grad` and
    reduced over the ranks, without a copy. Nothing waits for the device until `read`.

    Args:
        network: every rank holds all of its parameters, unsharded; those that are frozen have no gradient.
        world: the ranks that share a batch.
        global_batch: samples of a step, by which the loss is divided.
    """

    def __init__(self, network: nn.Module, world: World, global_batch: int) -> None:
        self.world, self.global_batch = world, global_batch
        self._squares: list[Tensor] = []  # one for each parameter's gradient in this part
        self._parts: list[Tensor] = []
        self._steps: list[Tensor] = []
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.register_hook(self._record)  # type: ignore[no-untyped-call]

    def _record(self, gradient: Tensor) -> None:
        self._squares.append(_square(gradient))

    def start_part(self) -> None:
        """Begin a part before its backward pass."""
        self._squares.clear()

    def end_part(self, valid_N: Tensor) -> None:
        """End a part after its backward pass.

        Args:
            valid_N: False for samples that could not be read.
        """
        square, num_samples = torch.stack(self._squares).sum(), valid_N.sum()
        is_part = num_samples > 0
        share = torch.where(is_part, square / num_samples, 0.0)
        self._parts.append(torch.stack([share, is_part.double(), num_samples.double()]))

    def end_step(self, gradients: Sequence[Tensor], loss_scale: Tensor, skip: Tensor) -> None:
        """End a step once its gradient is summed over all ranks.

        Args:
            gradients: free of any loss scale.
            loss_scale: factor of the parts' gradients.
            skip: 1 if the step is skipped; it does not count here.
        """
        factor = self.global_batch / (self.world.world_size * loss_scale.double())
        share, num_parts, num_samples = torch.stack(self._parts).sum(0)
        square = torch.stack([_square(gradient) for gradient in gradients]).sum()
        row = torch.stack([share * factor**2, num_parts, num_samples, square, skip.double()])
        self._steps.append(row)
        self._parts.clear()

    def pending(self) -> Tensor:
        """Return this rank's measurements since `read`, for `load` of a resumed run: float64 (steps, 5)."""
        return torch.stack(self._steps) if self._steps else torch.zeros(0, 5, dtype=torch.float64)

    def load(self, ranks: Tensor) -> None:
        """Restore the measurements of all ranks, of the same or of another number of ranks.

        Args:
            ranks: `pending` of each, (world_size then, steps, 5).
        """
        mine = ranks[0].clone()
        mine[:, :3] = self.world.own_share(ranks[:, :, :3])  # parts add up; the rest is the same on all ranks
        self._steps = list(mine.to(self.world.device))

    def read(self) -> NoiseEstimate | None:
        """Estimate over the steps since the last call. Waits for the device; every rank must call it.

        Returns:
            The same on every rank; None if every step was skipped.
        """
        rows, self._steps = torch.stack(self._steps), []
        kept = rows[:, 4] == 0
        # A skipped step's numbers can be NaN; its row stays as 0, so that all ranks reduce equal shapes.
        ranks = torch.where(kept[:, None], rows[:, :3], 0.0)
        self.world.all_reduce(ranks)
        steps = torch.cat([ranks, rows[:, 3:4]], dim=1)[kept]
        return estimate_noise(steps.tolist(), self.global_batch)


def _square(gradient: Tensor) -> Tensor:
    """Return the squared length, float64 ().

    Row by row: a float32 sum over 17 million numbers at once is 0.1% too small on a CPU.
    """
    rows = gradient.flatten(1) if gradient.ndim > 1 else gradient
    lengths: Tensor = torch.linalg.vector_norm(rows, dim=-1)
    return lengths.double().square().sum()
