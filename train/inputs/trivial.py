"""TrivialAugment on the device, with Pillow's pixels to the bit.

Every image passes the same three families of operations, with numbers that leave it as it is where its
operation is of another: an affine map, a blend with a degenerate image, and tables of levels. So nothing
depends on which operations were drawn: no shape, no choice on the host, no waiting for the device. All sums
are whole, or rounded as Pillow rounds them; so the device and the order of a sum do not matter.

Legend: N images of S x S pixels, P = S + 2; K numbers that describe an image; 2 coordinates, x before y; 3
colours; X = S * S * 3 values of an image; L = 256 levels.
Source: Pillow 13, src/libImaging/Geometry.c, Blend.c, Convert.c, Filter.c; ImageEnhance.py, ImageOps.py:
what torchvision's `TrivialAugmentWide` calls for a Pillow image.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import pad

from data_pipeline.transforms.trivial import Operation, TrivialParams

_ONE = 1 << 16  # a coordinate of 1
# Rows of the numbers of an image.
_AFFINE = slice(0, 6)
_FACTOR, _IS_COLOR, _IS_CONTRAST, _IS_SHARPNESS = 6, 7, 8, 9
_MASK, _THRESHOLD, _IS_AUTOCONTRAST, _IS_EQUALIZE = 10, 11, 12, 13
_K = 14


def trivial_augment(images_NSS3: Tensor, numbers_KN: Tensor) -> Tensor:
    """Carry out an operation on each image; what lies outside of a moved image is black.

    Args:
        images_NSS3: uint8 RGB.
        numbers_KN: `pack_trivial` of these N, on the images' device.
    Returns:
        Images of the same shape: the pixels of `torchvision.transforms.v2.functional` for Pillow images.
    """
    assert len(images_NSS3) == numbers_KN.shape[1] and images_NSS3.shape[1] == images_NSS3.shape[2]
    images_NSS3 = _move(images_NSS3, numbers_KN[_AFFINE].to(torch.int32))
    numbers_KN = numbers_KN.to(torch.float32)
    return _look_up(_blend(images_NSS3, numbers_KN), numbers_KN)


def pack_trivial(params: TrivialParams, side: int) -> npt.NDArray[np.float64]:
    """Return what the device must know of the operations, (K, N), in one array.

    Args:
        params: see `trivial_params_at`.
        side: of the images, in pixels.
    """
    operations, magnitudes = params.operations, params.magnitudes
    packed_KN = np.zeros((_K, len(params)))
    packed_KN[_AFFINE] = _affine(params, side).reshape(6, -1)
    enhanced = (operations >= Operation.BRIGHTNESS) & (operations <= Operation.SHARPNESS)
    packed_KN[_FACTOR] = np.where(enhanced, 1 + magnitudes, 1)
    kept_bits = np.where(operations == Operation.POSTERIZE, magnitudes, 8)
    packed_KN[_MASK] = 256 - 2 ** (8 - kept_bits)
    packed_KN[_THRESHOLD] = np.where(operations == Operation.SOLARIZE, magnitudes, 256)
    for row, operation in (
        (_IS_COLOR, Operation.COLOR),
        (_IS_CONTRAST, Operation.CONTRAST),
        (_IS_SHARPNESS, Operation.SHARPNESS),
        (_IS_AUTOCONTRAST, Operation.AUTOCONTRAST),
        (_IS_EQUALIZE, Operation.EQUALIZE),
    ):
        packed_KN[row] = operations == operation
    return packed_KN


def _affine(params: TrivialParams, side: int) -> npt.NDArray[np.float64]:
    """(2, 3, N), whole, in units of 2**-16: the input's x and y as sums of the output's x, y and 1.

    Pixels are meant by their number, and the coordinates that come out are to be rounded down.
    """
    operations, magnitudes = params.operations, params.magnitudes
    map_23N = np.repeat(np.eye(2, 3)[..., None], len(params), axis=2)
    for operation, axis, term, sign in (
        (Operation.SHEAR_X, 0, 1, 1),
        (Operation.SHEAR_Y, 1, 0, 1),
        (Operation.TRANSLATE_X, 0, 2, -1),
        (Operation.TRANSLATE_Y, 1, 2, -1),
    ):
        chosen = operations == operation
        map_23N[axis, term, chosen] = sign * magnitudes[chosen]
    turned = operations == Operation.ROTATE
    angles = -np.radians(magnitudes[turned] % 360)
    # Pillow turns squares by quarters without arithmetic: rounded to 15 digits, the map does the same
    cosines, sines = np.cos(angles).round(15), np.sin(angles).round(15)
    center = side / 2
    map_23N[0, :, turned] = np.stack([cosines, sines, center - cosines * center - sines * center], axis=1)
    map_23N[1, :, turned] = np.stack([-sines, cosines, center + sines * center - cosines * center], axis=1)
    map_23N[:, 2] += (map_23N[:, 0] + map_23N[:, 1]) * 0.5  # from the middle of a pixel
    whole: npt.NDArray[np.float64] = np.floor(map_23N * _ONE + 0.5)
    return whole


def _move(images_NSS3: Tensor, affine_6N: Tensor) -> Tensor:
    """Take each pixel from where a map says: Pillow's `affine_fixed`, nearest."""
    num_images, side = images_NSS3.shape[:2]
    map_23N1 = affine_6N.view(2, 3, -1, 1)
    places_S = torch.arange(side, dtype=torch.int32, device=images_NSS3.device)
    columns_2NS, rows_2NS = map_23N1[:, 0] * places_S, map_23N1[:, 1] * places_S + map_23N1[:, 2]
    xy_2NSS = (rows_2NS[..., None] + columns_2NS[:, :, None]).bitwise_right_shift_(16)
    xy_2NSS.clamp_(-1, side)  # the pixels there are black
    padded_NPP3 = pad(images_NSS3, (0, 0, 1, 1, 1, 1))
    wide = side + 2
    firsts_N = torch.arange(num_images, device=images_NSS3.device) * wide**2 + (wide + 1)
    index_NSS = torch.add(xy_2NSS[0], xy_2NSS[1], alpha=wide) + firsts_N[:, None, None]
    return padded_NPP3.view(-1, 3).index_select(0, index_NSS.view(-1)).view_as(images_NSS3)


def _blend(images_NSS3: Tensor, numbers_KN: Tensor) -> Tensor:
    """Blend each image with its degenerate one: black, its own gray, its mean gray, or the smoothed image.

    In float32 and in the order of Pillow's sum, and rounded down.
    """
    values_NSS3 = images_NSS3.to(torch.float32)
    is_color, is_contrast, is_sharpness, factor = (
        numbers_KN[row][:, None, None] for row in (_IS_COLOR, _IS_CONTRAST, _IS_SHARPNESS, _FACTOR)
    )
    gray_NSS = _gray(values_NSS3)
    count = gray_NSS[0].numel()
    means_N = gray_NSS.sum((1, 2), dtype=torch.float64).mul_(2).add_(count).div_(2 * count).floor_()
    plain_NSS = gray_NSS.mul_(is_color).addcmul_(means_N.to(torch.float32)[:, None, None], is_contrast)
    sharpened = is_sharpness[..., None] > 0
    degenerate_NSS3 = torch.where(sharpened, values_NSS3, plain_NSS[..., None])
    inner_NSS3 = degenerate_NSS3[:, 1:-1, 1:-1]  # Pillow smooths no border
    torch.where(sharpened, _smooth(values_NSS3), inner_NSS3, out=inner_NSS3)
    values_NSS3.sub_(degenerate_NSS3).mul_(factor[..., None]).add_(degenerate_NSS3)
    return values_NSS3.clamp_(0, 255).to(torch.uint8)


def _gray(values_NSS3: Tensor) -> Tensor:
    """(N, S, S) float32, whole: ITU-R 601's luma in units of 2**-16, which float32 holds; then rounded."""
    red, green, blue = values_NSS3.unbind(-1)
    luma = (red * 19595).add_(green, alpha=38470).add_(blue, alpha=7471)
    return luma.add_(32768).div_(_ONE).floor_()


def _smooth(values_NSS3: Tensor) -> Tensor:
    """(N, S - 2, S - 2, 3): the mean of 3 x 3 pixels, the one in the middle five times, rounded."""
    rows = values_NSS3[:, :-2] + values_NSS3[:, 1:-1]
    rows.add_(values_NSS3[:, 2:])
    sums = rows[:, :, :-2] + rows[:, :, 1:-1]
    sums.add_(rows[:, :, 2:]).add_(values_NSS3[:, 1:-1, 1:-1], alpha=4)
    return sums.add_(6.5).div_(13).floor_()


def _look_up(images_NSS3: Tensor, numbers_KN: Tensor) -> Tensor:
    """Replace levels by those of a table for each image and colour."""
    num_images, device = len(images_NSS3), images_NSS3.device
    # Each colour has bins of its own.
    offsets_3 = torch.arange(0, 768, 256, device=device)
    bins_NX = (images_NSS3 + offsets_3).view(num_images, -1)
    counts_NX = torch.zeros((num_images, 768), dtype=torch.int32, device=device)
    with _in_any_order():
        counts_NX.scatter_add_(
            1, bins_NX, torch.ones((), dtype=torch.int32, device=device).expand_as(bins_NX)
        )
    low_N3, high_N3 = images_NSS3.view(num_images, -1, 3).aminmax(dim=1)
    tables_N3L = _tabulate(counts_NX.view(num_images, 3, 256), low_N3.int(), high_N3.int(), numbers_KN)
    return tables_N3L.view(num_images, -1).gather(1, bins_NX).view_as(images_NSS3)


@contextmanager
def _in_any_order() -> Iterator[None]:
    """Let whole numbers be added in any order, which changes no sum, with `deterministic = true` too.

    The kernel that torch would take then sorts the places first, with several GB for a large batch.
    """
    if not torch.are_deterministic_algorithms_enabled():
        yield
        return
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(True)


def _tabulate(counts_N3L: Tensor, low_N3: Tensor, high_N3: Tensor, numbers_KN: Tensor) -> Tensor:
    """The tables, (N, 3, L) uint8, of images with these histograms, lowest and highest levels."""
    mask, threshold, is_autocontrast, is_equalize = (
        numbers_KN[row][:, None, None] for row in (_MASK, _THRESHOLD, _IS_AUTOCONTRAST, _IS_EQUALIZE)
    )
    levels_L = torch.arange(256, dtype=torch.int32, device=counts_N3L.device)
    kept = levels_L & mask.to(torch.int32)
    plain = torch.where(kept >= threshold, 255 - kept, kept)

    low, high = low_N3[..., None], high_N3[..., None]
    span = (high - low).clamp_(min=1).to(torch.float64)
    scale = torch.full_like(span, 255).div_(span)  # `255 / span` were 255 times the reciprocal
    stretched = (levels_L * scale).sub_(low * scale).clamp_(0, 255).to(torch.int32)
    tables = torch.where((is_autocontrast > 0) & (high > low), stretched, plain)

    sums = counts_N3L.cumsum(-1, dtype=torch.int32)
    total = sums[..., -1:]
    step = (total - counts_N3L.gather(-1, high.long())) // 255
    # up to a level, without it
    evened = ((sums - counts_N3L + step // 2) // step.clamp(min=1)).clamp_(max=255)
    return torch.where((is_equalize > 0) & (step > 0), evened, tables).to(torch.uint8)
