"""All kernels as plain torch, for any device, also in float64: what Triton's are compared with.

They take the same arguments and save the same tensors; see `train.kernels.interface.Kernels`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import max_pool2d, pad
from torch.nn.modules.batchnorm import _BatchNorm

from train.inputs.erase import erase_inputs
from train.inputs.mixup import MixInputs, mix_inputs
from train.kernels.block import DEAD, BlockSpec, Gradients, Saved
from train.kernels.interface import Kernels, SgdForm
from train.kernels.stem import COLORS, BlockShape

# Shapes: N samples, C channels, H and W rows and columns of a convolution's output, Y and X of the block's.
# Of the first convolution's inputs: B blocks along a side, D channels of a block, I = 3 colours.


def block_forward(
    spec: BlockSpec, x_NCHW: Tensor, bias_C: Tensor | None, norm: _BatchNorm | None
) -> tuple[Tensor, Saved]:
    """Compute a block's output, and what its backward pass needs; update the running statistics."""
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


def block_backward(
    spec: BlockSpec,
    saved: Saved,
    grad_NCYX: Tensor,
    bias_C: Tensor | None,
    norm: _BatchNorm | None,
    sides: torch.Size,
) -> Gradients:
    """Compute the gradients of a block from that of its output."""
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


def s2d_inputs(
    images_NHWC: Tensor,
    scale_I: Tensor,
    shift_I: Tensor,
    shape: BlockShape,
    dtype: torch.dtype,
    erase_N4: Tensor | None = None,
    mix: MixInputs | None = None,
) -> Tensor:
    """Normalise, erase, mix, pad and regroup images, in float32 or in float64 where the scale is."""
    sums = torch.float64 if scale_I.dtype == torch.float64 else torch.float32
    values_NIHW = (images_NHWC.to(sums) * scale_I + shift_I).permute(0, 3, 1, 2)
    if erase_N4 is not None:
        values_NIHW = erase_inputs(values_NIHW, erase_N4)
    if mix is not None:
        values_NIHW = mix_inputs(values_NIHW, mix)
    return _regroup(values_NIHW.permute(0, 2, 3, 1), shape).to(dtype)


def _regroup(values_NHWI: Tensor, shape: BlockShape) -> Tensor:
    """Pad images and make blocks of their pixels: (N, H, W, 3) -> (N, D, B, B), channels_last."""
    stride, blocks = shape.stride, shape.blocks
    behind = blocks * stride - shape.padding - shape.crop_px  # below 0: pixels that no window reads
    padded = pad(values_NHWI, (0, 0, shape.padding, behind, shape.padding, behind))
    split_NBaBbI = padded.reshape(-1, blocks, stride, blocks, stride, COLORS)
    values_NBBD = split_NBaBbI.permute(0, 1, 3, 2, 4, 5).reshape(-1, blocks, blocks, stride * stride * COLORS)
    zeros = shape.channels - values_NBBD.shape[-1]
    return pad(values_NBBD, (0, zeros)).permute(0, 3, 1, 2)


@torch.no_grad()
def update_parameter(
    weight: Tensor,
    velocity: Tensor | None,
    gradient: Tensor,
    rate: Tensor,
    skip: Tensor,
    form: SgdForm,
    ratio: Tensor | None = None,
    half: Tensor | None = None,
) -> None:
    """Update a weight and its velocity in place, and the weight's copy in another type."""
    keep = skip == 0
    change = gradient
    if form.weight_decay:
        change = change + form.weight_decay * weight
    if ratio is not None:
        change = change * ratio
    if form.lr_in_velocity:
        change = change * rate
    if velocity is not None:
        new_velocity = form.momentum * velocity + change
        change = change + form.momentum * new_velocity if form.nesterov else new_velocity
        velocity.copy_(torch.where(keep, new_velocity, velocity))
    if not form.lr_in_velocity:
        change = rate * change
    weight.copy_(torch.where(keep, weight - change, weight))
    if half is not None:
        half.copy_(weight)


PLAIN = Kernels(block_forward, block_backward, s2d_inputs, update_parameter)
