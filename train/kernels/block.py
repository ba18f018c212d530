"""What stands between two convolutions, with its gradient in closed form: the plain torch form.

A block takes a convolution's output without its bias, and applies bias, ReLU, a norm and max pooling of 3 x 3
with stride 2, as `BlockSpec` says. This is the reference for the kernels of `block_forward_triton.py` and
`block_backward_triton.py`, which save the same tensors. It runs on any device, also in float64. Sums are in
float32 at least. What a pooling compares is rounded to the input's type first, as torch compares it, so that
the same pixel of a tie wins: the first.

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
from torch.nn.functional import max_pool2d, pad
from torch.nn.modules.batchnorm import _BatchNorm

# Shapes: N samples, C channels, H and W rows and columns of a convolution's output, Y and X of the block's.

DEAD = 9
"""The byte of an output whose gradient reaches no pixel."""

BlockNorm = Literal["none", "lrn", "bn", "bn_after_relu"]


@dataclass(frozen=True)
class BlockSpec:
    """Which block: bias, then ReLU and the norm, then pooling.

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
    """What the backward pass reads; None what this block does not need.

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


def forward(
    spec: BlockSpec, x_NCHW: Tensor, bias_C: Tensor | None, norm: _BatchNorm | None
) -> tuple[Tensor, Saved]:
    """Compute a block's output, and what its backward pass needs; update the running statistics.

    Args:
        x_NCHW: the convolution's output without its bias, at least one sample, channels_last.
        bias_C: the convolution's bias, if it has one.
        norm: where the spec has batch normalisation.
    Returns:
        (N, C, Y, X) in the input's type, channels_last; the saved tensors.
    """
    wide_NCHW = _biased(x_NCHW, bias_C)
    saved = Saved(x_NCHW=None if spec.norm == "none" else x_NCHW)
    if spec.has_batch_norm:
        assert norm is not None
        if spec.norm == "bn_after_relu":
            wide_NCHW = wide_NCHW.relu()
        mean_C, rstd_C = _statistics(wide_NCHW, norm)
        saved = Saved(x_NCHW=x_NCHW, mean_C=mean_C, rstd_C=rstd_C)
        scale_C = norm.weight * rstd_C
        wide_NCHW = (wide_NCHW - _maps(mean_C)) * _maps(scale_C) + _maps(norm.bias)
    if spec.norm != "bn_after_relu":
        wide_NCHW = wide_NCHW.relu()
    if spec.norm == "lrn":
        wide_NCHW = wide_NCHW * _scale(spec, wide_NCHW) ** -spec.lrn_beta
    out_NCHW = wide_NCHW.to(x_NCHW.dtype)
    if spec.pool:
        return _pool(spec, out_NCHW, saved)
    return out_NCHW, Saved(out_NCHW=out_NCHW) if spec.norm == "none" else saved


def backward(
    spec: BlockSpec,
    saved: Saved,
    grad_NCYX: Tensor,
    bias_C: Tensor | None,
    norm: _BatchNorm | None,
    sides: torch.Size,
) -> Gradients:
    """Compute the gradients of a block from that of its output.

    Args:
        saved: of the forward pass.
        grad_NCYX: of the output, in its type.
        bias_C, norm: as they were in the forward pass.
        sides: (H, W) of the input.
    """
    wide_NCHW = grad_NCYX.to(torch.promote_types(grad_NCYX.dtype, torch.float32))
    if spec.pool:
        assert saved.index_NCYX is not None
        wide_NCHW = _unpool(spec, wide_NCHW, saved.index_NCYX, sides)
    if spec.norm == "none":
        if not spec.pool:
            assert saved.out_NCHW is not None
            wide_NCHW = wide_NCHW.masked_fill(saved.out_NCHW <= 0, 0)
        return _gradients(wide_NCHW, grad_NCYX.dtype, bias_C)
    assert saved.x_NCHW is not None
    value_NCHW = _biased(saved.x_NCHW, bias_C)
    if spec.norm == "lrn":
        dead_NCHW, value_NCHW = value_NCHW <= 0, value_NCHW.relu()
        scale_NCHW = _scale(spec, value_NCHW)
        direct_NCHW = wide_NCHW * scale_NCHW**-spec.lrn_beta
        inner_NCHW = _window_sum(direct_NCHW * value_NCHW / scale_NCHW, spec.lrn_size)
        factor = 2 * spec.lrn_alpha * spec.lrn_beta / spec.lrn_size
        dx_NCHW = (direct_NCHW - factor * value_NCHW * inner_NCHW).masked_fill(dead_NCHW, 0)
        return _gradients(dx_NCHW, grad_NCYX.dtype, bias_C)
    assert norm is not None and saved.mean_C is not None and saved.rstd_C is not None
    dead_NCHW = value_NCHW <= 0
    if spec.norm == "bn_after_relu":
        value_NCHW = value_NCHW.relu()
    scale_C = norm.weight * saved.rstd_C
    centred_NCHW = value_NCHW - _maps(saved.mean_C)
    if spec.norm == "bn":
        wide_NCHW = wide_NCHW.masked_fill(centred_NCHW * _maps(scale_C) + _maps(norm.bias) <= 0, 0)
    hat_NCHW = centred_NCHW * _maps(saved.rstd_C)
    norm_bias_C, norm_weight_C = wide_NCHW.sum((0, 2, 3)), (wide_NCHW * hat_NCHW).sum((0, 2, 3))
    count = hat_NCHW.numel() // hat_NCHW.shape[1]
    mean_NCHW = _maps(norm_bias_C / count) + hat_NCHW * _maps(norm_weight_C / count)
    dx_NCHW = (wide_NCHW - mean_NCHW) * _maps(scale_C)
    if spec.norm == "bn_after_relu":
        dx_NCHW = dx_NCHW.masked_fill(dead_NCHW, 0)
    return _gradients(dx_NCHW, grad_NCYX.dtype, bias_C, norm_weight_C, norm_bias_C)


def _gradients(
    dx_NCHW: Tensor,
    kind: torch.dtype,
    bias_C: Tensor | None,
    norm_weight_C: Tensor | None = None,
    norm_bias_C: Tensor | None = None,
) -> Gradients:
    of_bias_C = None if bias_C is None else dx_NCHW.sum((0, 2, 3))
    dx_NCHW = dx_NCHW.to(kind).contiguous(memory_format=torch.channels_last)
    return Gradients(dx_NCHW, of_bias_C, norm_weight_C, norm_bias_C)


def _maps(values_C: Tensor) -> Tensor:
    return values_C[:, None, None]


def _biased(x_NCHW: Tensor, bias_C: Tensor | None) -> Tensor:
    wide_NCHW = x_NCHW.to(torch.promote_types(x_NCHW.dtype, torch.float32))
    return wide_NCHW if bias_C is None else wide_NCHW + _maps(bias_C)


def _window_sum(x_NCHW: Tensor, size: int) -> Tensor:
    """Sum over `size` neighbouring channels, centred, clipped at the ends."""
    return pad(x_NCHW, (0, 0, 0, 0, size // 2, size // 2)).unfold(1, size, 1).sum(-1)


def _scale(spec: BlockSpec, value_NCHW: Tensor) -> Tensor:
    return spec.lrn_k + spec.lrn_alpha / spec.lrn_size * _window_sum(value_NCHW.square(), spec.lrn_size)


def _statistics(value_NCHW: Tensor, norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    """Return mean and 1 / standard deviation of each channel, and count them in."""
    variance_C, mean_C = torch.var_mean(value_NCHW, (0, 2, 3), correction=0)
    count = value_NCHW.numel() // value_NCHW.shape[1]
    assert norm.running_mean is not None and norm.running_var is not None and norm.momentum is not None
    assert norm.num_batches_tracked is not None
    norm.num_batches_tracked.add_(1)
    norm.running_mean.lerp_(mean_C.to(norm.running_mean.dtype), norm.momentum)
    unbiased_C = variance_C * (count / (count - 1))
    norm.running_var.lerp_(unbiased_C.to(norm.running_var.dtype), norm.momentum)
    return mean_C, (variance_C + norm.eps).rsqrt()


def _pool(spec: BlockSpec, map_NCHW: Tensor, saved: Saved) -> tuple[Tensor, Saved]:
    out_NCYX, place_NCYX = max_pool2d(
        map_NCHW, 3, 2, spec.pool_padding, ceil_mode=spec.pool_ceil, return_indices=True
    )
    width = map_NCHW.shape[3]
    top_Y1, left_X = _corners(spec, out_NCYX)
    index_NCYX = (place_NCYX // width - top_Y1) * 3 + place_NCYX % width - left_X
    if spec.norm != "bn_after_relu":
        index_NCYX = index_NCYX.masked_fill(out_NCYX <= 0, DEAD)
    peaks_NCYX = None
    if spec.has_batch_norm:
        assert saved.x_NCHW is not None
        peaks_NCYX = saved.x_NCHW.flatten(2).gather(2, place_NCYX.flatten(2)).view(place_NCYX.shape)
        peaks_NCYX = peaks_NCYX.contiguous(memory_format=torch.channels_last)
    index_NCYX = index_NCYX.byte().contiguous(memory_format=torch.channels_last)  # as kernels save it
    return out_NCYX, Saved(saved.x_NCHW, None, index_NCYX, peaks_NCYX, saved.mean_C, saved.rstd_C)


def _unpool(spec: BlockSpec, grad_NCYX: Tensor, index_NCYX: Tensor, sides: torch.Size) -> Tensor:
    """Add each output's gradient to the pixel that it is."""
    top_Y1, left_X = _corners(spec, grad_NCYX)
    dead_NCYX, index_NCYX = index_NCYX == DEAD, index_NCYX.long()
    place_NCYX = (top_Y1 + index_NCYX // 3) * sides[1] + left_X + index_NCYX % 3
    place_NCP, grad_NCP = (
        t.masked_fill(dead_NCYX, 0).flatten(2) for t in (place_NCYX, grad_NCYX)
    )  # P the pixels
    map_NCP = grad_NCYX.new_zeros(*grad_NCYX.shape[:2], sides.numel())
    return map_NCP.scatter_add_(2, place_NCP, grad_NCP).view(*grad_NCYX.shape[:2], *sides)


def _corners(spec: BlockSpec, out_NCYX: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows (Y, 1) and columns (X) where the windows begin, -1 in the padding."""
    top_Y, left_X = (
        torch.arange(side, device=out_NCYX.device) * 2 - spec.pool_padding for side in out_NCYX.shape[2:]
    )
    return top_Y[:, None], left_X
