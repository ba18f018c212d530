"""Skips steps whose gradient is not finite: decided and counted on the device, read when a row is written.

A step whose loss or gradient is not finite on any rank is skipped on all: gradients are checked after they
were summed over the ranks, and `propagate_nonfinite` carries a loss that is not finite into them, so that
every rank sees the same without another collective.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from data_pipeline.common.errors import CorruptFileError

SPIKE_WARMUP = 20
"""Accepted steps before a gradient can be a spike: the running mean is not reliable earlier."""
SPIKE_DECAY = 0.98
"""Decay of the running mean of the gradient's norm, which averages about 50 steps."""
MIN_SCALE = 1.0
"""Lowest usable loss scale of float16: it starts at 65536 and halves with each overflow."""


@dataclass(frozen=True)
class SkipStats:
    """Counts of skipped steps since the run began.

    Attributes:
        total: steps skipped.
        spikes: how many of them had a finite gradient that was too large.
        in_row: consecutive steps skipped, up to now.
        first: first step of that series, as steps finished before it.
    """

    total: int
    spikes: int
    in_row: int
    first: int


class Guard:
    """Decides which steps may change the weights. Nothing waits for the device until `read`.

    Args:
        device: of the gradients.
        max_skipped: so many consecutive skipped steps end the run; from there on every step is skipped, so
            that the weights are those of the last good step however late the run is stopped.
        spike_factor: a gradient whose norm is more than so many times its running mean is skipped as well.
    """

    def __init__(self, device: torch.device, *, max_skipped: int, spike_factor: float | None) -> None:
        self.max_skipped, self.spike_factor = max_skipped, spike_factor
        self.counts = torch.zeros(4, dtype=torch.int64, device=device)  # as the fields of SkipStats
        self.norms = torch.zeros(2, dtype=torch.float64, device=device)  # accepted steps, mean of their norms

    def should_skip(self, gradients: Sequence[Tensor], step: Tensor) -> Tensor:
        """Decide whether to skip a step, and count it, in place.

        Args:
            gradients: summed over the ranks and free of any loss scale.
            step: () int64, optimiser steps finished before this one, on the device.
        Returns:
            float32 (), 1 to skip and 0 to keep the step: the `found_inf` of a fused optimiser.
        """
        norm = get_total_norm(gradients).double()
        finite = torch.isfinite(norm)
        total, spikes, in_row, first = self.counts.unbind()
        accepted, mean = self.norms.unbind()
        bad = ~finite | (in_row >= self.max_skipped)
        if self.spike_factor is not None:
            spike = finite & (accepted >= SPIKE_WARMUP) & (norm > self.spike_factor * mean)
            bad, spikes = bad | spike, spikes + spike
        first = torch.where(bad & (in_row == 0), step, first)
        counts = torch.stack([total + bad, spikes, torch.where(bad, in_row + 1, 0), first])
        kept = torch.where(accepted == 0, norm, SPIKE_DECAY * mean + (1 - SPIKE_DECAY) * norm)
        self.norms.copy_(torch.stack([accepted + ~bad, torch.where(bad, mean, kept)]))
        self.counts.copy_(counts)
        return bad.float()

    def read(self) -> SkipStats:
        """Return the counts. Waits for the device."""
        return SkipStats(*self.counts.tolist())

    def state_dict(self) -> dict[str, Tensor]:
        """Return the tensors with which a resumed run decides as this one would have."""
        return {"counts": self.counts, "norms": self.norms}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore a saved state.

        Raises:
            CorruptFileError: not what `state_dict` returned.
        """
        for name, tensor in self.state_dict().items():
            found = state.get(name)
            if found is None or found.shape != tensor.shape or found.dtype != tensor.dtype:
                raise CorruptFileError(f"the checkpoint's guard has no usable {name}")
            tensor.copy_(found)


def propagate_nonfinite(loss: Tensor) -> Tensor:
    """Return a finite loss unchanged, to the bit; one that is not finite makes all its gradients NaN.

    A loss can be infinite with finite gradients (logits far apart), and only gradients are reduced over the
    ranks.
    """
    return loss * (1 + 0 * loss.detach())


def restore_buffers(network: nn.Module, before: Sequence[Tensor], skip: Tensor) -> None:
    """Undo a skipped step's change to running statistics (BatchNorm's), made by its forward pass."""
    for buffer, old in zip(network.buffers(), before, strict=True):
        buffer.copy_(torch.where(skip.bool(), old, buffer))


def all_finite(tensors: Sequence[Tensor]) -> bool:
    """Return whether no floating-point tensor holds NaN or infinity. Waits for the device."""
    floats = [tensor for tensor in tensors if tensor.is_floating_point()]
    # A sum is several times as fast as checking each number, but overflows for huge ones: check those again.
    if all(torch.isfinite(torch.stack([t.sum(dtype=torch.float32) for t in floats])).tolist()):
        return True
    return all(bool(torch.isfinite(tensor).all()) for tensor in floats)
