"""The layers between two convolutions as one block: its kinds, what it saves, how kernels divide its maps.

A block takes a convolution's output without its bias, and applies bias, ReLU, a norm and max pooling of 3 x 3
with stride 2, as `BlockSpec` says. Sums are in float32 at least. What a pooling compares is rounded to the
input's type first, as torch compares it, so that the same pixel of a tie wins: the first.

A pooled output keeps one byte: which of the 9 pixels of its window it is, or `DEAD` where its gradient
reaches no pixel. That is where the output is 0 behind a ReLU: whichever pixel torch chooses there, its ReLU
stops the gradient, so that ties at 0 need no choice. With batch normalisation behind the ReLU ties at 0 have
a gradient, and every output keeps torch's choice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

# Shapes: N samples, C channels, H and W rows and columns of a convolution's output, Y and X of the block's.

DEAD = 9
"""The byte of an output whose gradient reaches no pixel."""

TILE = 1024
"""Elements that a program holds at once: eight of each thread."""
MOST_PROGRAMS = 2048
"""Of kernels that go over the map in parts: some for each multiprocessor of the largest cards."""

BlockNorm = Literal["none", "lrn", "bn", "bn_after_relu"]


@dataclass(frozen=True)
class BlockSpec:
    """The operations of a block: bias, then ReLU and the norm, then pooling.

    Attributes:
        norm: `lrn` and `bn_after_relu` stand behind the ReLU, `bn` in front of it.
        pool: whether max pooling follows, of 3 x 3 pixels with stride 2.
        pool_padding: pixels around the map, 0 or 1.
        pool_ceil: whether the pooled map's size is rounded up.
        lrn_size: channels in LRN's window, odd.
        lrn_alpha, lrn_beta, lrn_k: LRN's other constants; alpha is divided by the size.
    """

    norm: BlockNorm = "none"
    pool: bool = False
    pool_padding: int = 0
    pool_ceil: bool = False
    lrn_size: int = 5
    lrn_alpha: float = 1e-4
    lrn_beta: float = 0.75
    lrn_k: float = 2.0

    def __post_init__(self) -> None:
        assert self.pool_padding in (0, 1) and self.lrn_size % 2 == 1

    @property
    def has_batch_norm(self) -> bool:
        """Whether statistics of the pass normalise."""
        return self.norm in ("bn", "bn_after_relu")

    def out_sides(self, height: int, width: int) -> tuple[int, int]:
        """Return rows and columns of the output for those of the input.

        >>> BlockSpec(pool=True).out_sides(55, 12), BlockSpec(pool=True, pool_ceil=True).out_sides(13, 12)
        ((27, 5), (6, 6))
        """
        if not self.pool:
            return height, width
        return self._pooled(height), self._pooled(width)

    def _pooled(self, side: int) -> int:
        beyond = side + 2 * self.pool_padding - 3  # pixels beyond the first window
        if not self.pool_ceil:
            return beyond // 2 + 1
        steps = -(-beyond // 2)
        # a window that would begin behind the last pixel is left out
        return steps + (2 * steps < side + self.pool_padding)


@dataclass(frozen=True)
class Saved:
    """Tensors that the backward pass reads; None where a block needs none.

    Attributes:
        x_NCHW: the convolution's output.
        out_NCHW: the block's output.
        index_NCYX: uint8, which pixel of its window an output is, by rows, or `DEAD`.
        peaks_NCYX: x at those pixels; anything where `DEAD`.
        mean_C, rstd_C: float32, of what batch normalisation normalises.
    """

    x_NCHW: Tensor | None = None
    out_NCHW: Tensor | None = None
    index_NCYX: Tensor | None = None
    peaks_NCYX: Tensor | None = None
    mean_C: Tensor | None = None
    rstd_C: Tensor | None = None


@dataclass(frozen=True)
class Gradients:
    """Gradients of a block's input and parameters; float32 those of parameters, None where there is none."""

    x_NCHW: Tensor
    bias_C: Tensor | None = None
    norm_weight_C: Tensor | None = None
    norm_bias_C: Tensor | None = None


def channel_block(channels: int, whole_row: bool = False) -> int:
    """Return how many channels a program takes: a power of two up to 128, or all of them.

    >>> channel_block(64), channel_block(96), channel_block(192), channel_block(384), channel_block(96, True)
    (64, 32, 64, 128, 128)
    """
    if whole_row:
        return 1 << (channels - 1).bit_length()
    divisor = channels & -channels
    return min(divisor, 128) if divisor >= 32 else min(1 << (channels - 1).bit_length(), 128)


def divide(map_NCHW: Tensor, whole_row: bool = False) -> tuple[tuple[int, int], int, int, int]:
    """Divide a map among programs, each with a part of its rows and a block of its channels.

    Returns:
        The grid, of at most `MOST_PROGRAMS`; the map's rows; rows and channels that a program holds at once.
    """
    channels = map_NCHW.shape[1]
    num_rows, size = map_NCHW.numel() // channels, channel_block(channels, whole_row)
    num_blocks, rows = -(-channels // size), max(1, TILE // size)
    num_parts = min(-(-num_rows // rows), max(1, MOST_PROGRAMS // num_blocks))
    return (num_parts, num_blocks), num_rows, rows, size


def empty_map(x_NCHW: Tensor, sides: tuple[int, ...], kind: torch.dtype) -> Tensor:
    """Return a map of other sides than x, with as many images and channels, channels_last."""
    return torch.empty(
        (*x_NCHW.shape[:2], *sides), dtype=kind, device=x_NCHW.device, memory_format=torch.channels_last
    )
