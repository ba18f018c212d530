"""Cuts, resizes, mirrors and colours decoded images on their device, with Pillow's pixels.

Pillow's resize is separable: each column, then each row (or the other way round) is a weighted sum of others,
rounded to 8 bits. Here both are matrices, a pair for each sample, that also cut the window and the crop, and
mirror: two products make a crop from the whole image. They are exact, since weights are whole multiples of
2**-22 and the products in float64; so the device and the order of a sum do not matter.

Nothing waits for the device: what depends on the crops is decided from the arrays on the host.

Legend: M images of H x W pixels; S samples, V for each of B images; C the side of a crop; P = max(H, W); 2
axes, rows before columns; K numbers that describe a sample; x3 the colours.
Source: Pillow 13, src/libImaging/Resample.c and Matrix.c.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from data_pipeline.transforms.crop import CropParams
from train.inputs.packed import tensor_to_device

_ONE = 1 << 22  # a weight of 1
_CHUNK_BYTES = 1 << 26
# Rows of the numbers of a sample; the first six are pairs, for rows and for columns.
_AXES, _INDEX, _PLACE, _COLORS, _K = slice(0, 12), 12, 13, slice(14, 26), 26


def crop_cached(pixels_MHWC: Tensor, indices_B: npt.NDArray[np.int64], crops: CropParams) -> Tensor:
    """Make a batch of crops from images that are on the device.

    Args:
        pixels_MHWC: (M, H, W, 3) uint8, contiguous.
        indices_B: (B) the image in it that each is of.
        crops: B crops of images of that size.
    Returns:
        (B, C, C, 3) uint8, or (B, V, C, C, 3), on the device of `pixels_MHWC`: the pixels that
        `data_pipeline.decode.pillow.finish_crop` gives.
    """
    assert len(indices_B) == len(crops) and indices_B.min() >= 0 and indices_B.max() < len(pixels_MHWC)
    device, side = pixels_MHWC.device, crops.crop_px
    packed_KS, num_rows_first = _pack(indices_B, crops)
    numbers_KS = tensor_to_device(packed_KS, device)
    num_samples = numbers_KS.shape[1]
    images_SCCx3 = torch.empty((num_samples, side, side, 3), dtype=torch.uint8, device=device)
    step = _chunk_size(pixels_MHWC.shape, side)
    for first in range(0, num_samples, step):
        part_KS, target_SCCx3 = numbers_KS[:, first : first + step], images_SCCx3[first : first + step]
        values_SCx3C = _resize(pixels_MHWC, part_KS, side, max(0, num_rows_first - first))
        if crops.colors is not None:
            values_SCx3C = _color(values_SCx3C, part_KS[_COLORS])
        target_SCCx3.copy_(values_SCx3C.transpose(2, 3))
    if 0 < num_rows_first < num_samples:
        images_SCCx3 = images_SCCx3.index_select(0, numbers_KS[_PLACE].long())
    return images_SCCx3.reshape(len(crops), *crops.views, side, side, 3)


def _pack(indices_B: npt.NDArray[np.int64], crops: CropParams) -> tuple[npt.NDArray[np.float64], int]:
    """Pack the parameters of the crops into one array, so that they go to the device in one copy.

    Returns:
        (K, S): samples whose rows Pillow resizes first come before the others. And how many those are.
    """
    num_views = crops.flips[0].size
    windows_4S = np.repeat(crops.windows, num_views, axis=0).T
    sizes_2S = np.repeat(crops.sizes, num_views, axis=0).T
    fewer_rows, fewer_columns = windows_4S[2:] - sizes_2S
    rows_first = (fewer_rows > 0) & (fewer_rows > 2 * fewer_columns)  # Pillow's choice
    scales_2S = windows_4S[2:] / sizes_2S
    flips_S = crops.flips.reshape(-1)
    packed = np.zeros((_K, len(flips_S)))
    packed[0:2] = crops.offsets.reshape(-1, 2).T + 0.5  # the middle of the first pixel of the crop
    packed[1] += (crops.crop_px - 1) * flips_S  # mirrored: from the last column to the first
    packed[2], packed[3] = 1, 1 - 2.0 * flips_S
    packed[4:6] = scales_2S
    packed[6:8] = 1 / np.maximum(scales_2S, 1)
    packed[8:12] = windows_4S
    packed[_INDEX] = np.repeat(indices_B, num_views)
    if crops.colors is not None:
        packed[_COLORS] = np.repeat(crops.colors.reshape(len(crops), -1), num_views, axis=0).T
    order = np.argsort(~rows_first, kind="stable")
    packed = np.ascontiguousarray(packed[:, order])
    packed[_PLACE, order] = np.arange(len(order))
    return packed, int(rows_first.sum())


def _chunk_size(shape: tuple[int, ...], side: int) -> int:
    """Return how many samples to resize at once, so that images in float64 and weights need little memory."""
    _, height, width, _ = shape
    wide = max(height, width, side)
    return max(1, _CHUNK_BYTES // (8 * (3 * wide * wide + 4 * side * wide)))


def _resize(pixels_MHWC: Tensor, numbers_KS: Tensor, side: int, num_rows_first: int) -> Tensor:
    """Resize samples to (S, C, 3, C) whole numbers in float64: first those that Pillow resizes by rows first.

    The colours are between the axes, so that both products are of matrices as they lie.
    """
    _, height, width, _ = pixels_MHWC.shape
    weights_2SCP = _weigh(numbers_KS, max(height, width), side)
    rows_SCH, columns_SWC = weights_2SCP[0, ..., :height], weights_2SCP[1, ..., :width].mT
    picked_SHWx3 = pixels_MHWC.index_select(0, numbers_KS[_INDEX].long())
    values = picked_SHWx3.transpose(2, 3).to(torch.float64, memory_format=torch.contiguous_format)
    half = values.new_full((1, 1, 1), 0.5)

    def by_rows(values: Tensor, part: slice) -> Tensor:
        sums = torch.baddbmm(half, rows_SCH[part], values.flatten(2), alpha=1 / _ONE)
        return sums.floor_().view(len(sums), side, 3, -1)

    def by_columns(values: Tensor, part: slice) -> Tensor:
        sums = torch.baddbmm(half, values.flatten(1, 2), columns_SWC[part], alpha=1 / _ONE)
        return sums.floor_().view(len(sums), -1, 3, side)

    head, tail = slice(0, num_rows_first), slice(num_rows_first, None)
    if num_rows_first == 0:
        return by_rows(by_columns(values, tail), tail)
    if num_rows_first >= len(values):
        return by_columns(by_rows(values, head), head)
    return torch.cat(
        [by_columns(by_rows(values[head], head), head), by_rows(by_columns(values[tail], tail), tail)]
    )


def _weigh(numbers_KS: Tensor, length: int, side: int) -> Tensor:
    """The weight of each input pixel in each output pixel: (2, S, C, P) float64, whole, in units of 2**-22.

    The order of the operations is that of `_weigh` in `data_pipeline.decode.resize_kernel`.
    """
    middle, step, scale, narrow, start, extent = numbers_KS[_AXES].reshape(6, 2, -1, 1, 1).unbind()
    places = torch.arange(max(length, side), dtype=torch.float64, device=numbers_KS.device)
    centers_2SC1 = torch.addcmul(middle, step, places[:side, None]).mul_(scale)
    inputs_2S1P = places[:length] - start
    outside = (inputs_2S1P < 0).logical_or_(inputs_2S1P >= extent)
    inputs_2S1P.masked_fill_(outside, float("inf"))  # which weighs nothing
    weights_2SCP = (inputs_2S1P - centers_2SC1).add_(0.5).mul_(narrow).abs_()
    weights_2SCP = (1.0 - weights_2SCP).clamp_(min=0.0)
    totals_2SC1 = weights_2SCP.sum(dim=-1, keepdim=True)
    padding_2SC1 = (centers_2SC1 < 0).logical_or_(centers_2SC1 > extent)  # by half a pixel or more
    totals_2SC1.masked_fill_(padding_2SC1, float("inf"))  # so that nothing weighs anything: black
    return weights_2SCP.div_(totals_2SC1.div_(_ONE)).add_(0.5).floor_()


def _color(values_SCx3C: Tensor, colors_KS: Tensor) -> Tensor:
    """Apply a matrix to each sample: (S, C, 3, C) float32, 0..255, to be rounded down.

    In float32 and in the order of Pillow's sums; without `addcmul`, which a GPU rounds once.
    """
    values = values_SCx3C.to(torch.float32)
    factors_4S131 = colors_KS.to(torch.float32).reshape(3, 4, -1).permute(1, 2, 0)[:, :, None, :, None]
    colored = values[:, :, 0:1] * factors_4S131[0]
    for channel in (1, 2):
        colored += values[:, :, channel : channel + 1] * factors_4S131[channel]
    return colored.add_(factors_4S131[3]).add_(0.5).clamp_(0.0, 255.0)
