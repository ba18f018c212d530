"""Computes how each image is cropped, resized, mirrored and coloured, for all phases and all backends.

Legend: N samples. Sizes and positions are in pixels, (y, x) and (height, width), of the upright image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from data_pipeline.transforms.augment import Augment
from data_pipeline.transforms.color import Colors, colors_at
from data_pipeline.transforms.preprocessing import Preprocessing
from data_pipeline.transforms.rng import (
    STREAM_CROP_TRIES,
    STREAM_FLIP,
    STREAM_OFFSET_X,
    STREAM_OFFSET_Y,
    integers_from,
    uniform_at,
)
from data_pipeline.transforms.sampler import Int

CROP_TRIES = 10
# A longer strip (1 x 100,000 pixels, say) would be resized to gigabytes; its middle is taken instead.
MAX_ASPECT = 16


@dataclass(frozen=True, eq=False)
class CropParams:
    """Cut `windows` from the upright image, resize to `sizes`, crop at `offsets`, colour, mirror if `flips`.

    What a crop has outside of the resized window is black, and is coloured like all other pixels. Several
    views of an image are several offsets and flips of one resized window; V is their number.

    Attributes:
        windows: (N, 4) int64, y, x, height, width in the upright source image.
        sizes: (N, 2) int64, height and width to which the window is resized, each at least `crop_px`.
        offsets: (N, 2) or (N, V, 2) int64, y and x of the crop in the resized window, of which each crop has
            a part. Below 0, or so that it ends behind the window, where the crop is padded.
        flips: (N) or (N, V) bool, mirror left and right at the end.
        crop_px: side of the square that comes out.
        colors: (N, 3, 4), see `data_pipeline.transforms.color`; None leaves the colours as they are.
    """

    windows: Int
    sizes: Int
    offsets: Int
    flips: npt.NDArray[np.bool_]
    crop_px: int
    colors: Colors | None = None

    def __len__(self) -> int:
        return len(self.windows)

    @property
    def views(self) -> tuple[int, ...]:
        """Empty for one view of each image, else (V,): the axes behind N in the shape of the images."""
        return self.flips.shape[1:]

    def set_cut(self, index: int) -> None:
        """Change the crop of one sample into one from its window, already resized, as an image of its own."""
        self.windows[index] = (0, 0, *self.sizes[index])

    def set_blank(self, index: int) -> None:
        """Change the crop of one sample into one that makes zeros of a single black pixel."""
        self.windows[index], self.sizes[index], self.offsets[index] = (0, 0, 1, 1), self.crop_px, 0
        if self.colors is not None:
            self.colors[index] = np.eye(3, 4)

    def take(self, indices: Sequence[int] | Int) -> CropParams:
        """The parameters of some of the samples, as a copy."""
        picked = np.asarray(indices, dtype=np.int64)
        return CropParams(
            self.windows[picked],
            self.sizes[picked],
            self.offsets[picked],
            self.flips[picked],
            self.crop_px,
            None if self.colors is None else self.colors[picked],
        )


def padding_px(crop_px: int) -> int:
    """Black pixels on each side of a padded image: an eighth of the crop, rounded down.

    Source: He et al. 2016, section 4.2: 4 pixels for crops of 32.

    >>> padding_px(32), padding_px(64)
    (4, 8)
    """
    return crop_px // 8


def eval_crop_params(heights_widths: npt.ArrayLike, preprocessing: Preprocessing) -> CropParams:
    """Parameters of evaluation: short side to `resize_px`, then the centre `crop_px` square.

    Args:
        heights_widths: (N, 2) upright sizes.
        preprocessing: the contract.
    Returns:
        The same pixels as torchvision's for images up to 16:1; of longer ones, the middle 16:1.
    Source: torchvision, `Resize(int)`, `CenterCrop`: int(size * long / short), int(round((side - crop) / 2)).
    """
    windows, sizes = _short_side(_as_sizes(heights_widths), preprocessing.resize_px)
    offsets = _centre_square(sizes, preprocessing.crop_px)
    return CropParams(windows, sizes, offsets, np.zeros(len(sizes), dtype=bool), preprocessing.crop_px)


def ten_crop_params(heights_widths: npt.ArrayLike, preprocessing: Preprocessing) -> CropParams:
    """Parameters of the paper's ten views: corners and centre of the centre `resize_px` square, and mirrored.

    Where that square is no larger than a crop, it is taken with `padding_px` more on each side: else all
    would be one view and its mirror.

    Args: as `eval_crop_params`.
    Returns:
        V = 10: top left, top right, bottom left, bottom right, centre; then the same of the mirrored image.
        The same pixels as torchvision's.
    Source: Krizhevsky et al. 2012, section 4.1; torchvision, `Resize`, `Pad`, `CenterCrop`, `TenCrop`.
    """
    windows, sizes = _short_side(_as_sizes(heights_widths), preprocessing.resize_px)
    crop_px, resize_px = preprocessing.crop_px, preprocessing.resize_px
    padding = padding_px(crop_px) if resize_px == crop_px else 0
    spare = resize_px + 2 * padding - crop_px
    middle = round(spare / 2)
    corners = np.array([[0, 0], [0, spare], [spare, 0], [spare, spare], [middle, middle]], dtype=np.int64)
    # a view of the mirrored image is the mirror of the window opposite
    views = np.concatenate([corners, corners * (1, -1) + (0, spare)])
    square = _centre_square(sizes, resize_px) - padding
    flips = np.tile(np.arange(10) >= 5, (len(sizes), 1))
    return CropParams(windows, sizes, square[:, None] + views, flips, crop_px)


def train_crop_params(
    heights_widths: npt.ArrayLike,
    epoch: int,
    positions: npt.ArrayLike,
    seed: int,
    preprocessing: Preprocessing,
    augment: Augment,
) -> CropParams:
    """Parameters of training, at random. A sample's depend on (seed, epoch, position) alone.

    Args:
        heights_widths: (N, 2) upright sizes.
        epoch: 0-based.
        positions: (N) places in the epoch's order.
        seed: the run's seed.
        preprocessing: the contract.
        augment: which crop and colours, and their ranges.
    Source: torchvision, `RandomResizedCrop.get_params`: area, log-uniform ratio, ten tries, then the centre;
        `RandomCrop(crop_px, padding=padding_px(crop_px))`, after `Resize`, for "padded".
    """
    sizes_N2 = _as_sizes(heights_widths)
    positions_N = np.asarray(positions, dtype=np.int64)
    crop_px = preprocessing.crop_px
    flips = uniform_at(seed, epoch, positions_N, STREAM_FLIP) < augment.flip
    colors = colors_at(seed, epoch, positions_N, augment)
    if augment.crop == "random_resized":
        windows = _random_windows(sizes_N2, epoch, positions_N, seed, augment)
        sizes = np.full((len(windows), 2), crop_px, dtype=np.int64)
        return CropParams(windows, sizes, np.zeros_like(sizes), flips, crop_px, colors)
    windows, sizes = _short_side(sizes_N2, preprocessing.resize_px)
    draws = uniform_at(seed, epoch, positions_N[:, None], np.array([STREAM_OFFSET_Y, STREAM_OFFSET_X]))
    if augment.crop == "center":
        offsets = _centre_square(sizes, crop_px)
    elif augment.crop == "random":
        offsets = integers_from(draws, sizes - crop_px + 1)
    elif augment.crop == "padded":
        padding = padding_px(crop_px)
        offsets = integers_from(draws, sizes + 2 * padding - crop_px + 1) - padding
    else:
        spare = np.full_like(sizes, preprocessing.resize_px - crop_px)
        offsets = _centre_square(sizes, preprocessing.resize_px) + integers_from(draws, spare + 1)
    return CropParams(windows, sizes, offsets, flips, crop_px, colors)


def _as_sizes(heights_widths: npt.ArrayLike) -> Int:
    sizes = np.asarray(heights_widths, dtype=np.int64).reshape(-1, 2)
    assert (sizes > 0).all(), "an image without pixels"
    return sizes


def _centre_square(sizes: Int, side: int) -> Int:
    """Top left corners of centre squares. np.rint and Python's round both round halves to even."""
    return np.rint((sizes - side) / 2.0).astype(np.int64)


def _short_side(heights_widths: Int, resize_px: int) -> tuple[Int, Int]:
    """Windows (the whole image, or the middle of a strip) and the sizes to which they are resized."""
    short = heights_widths.min(axis=1, keepdims=True)
    extent = np.minimum(heights_widths, MAX_ASPECT * short)
    windows = np.concatenate([(heights_widths - extent) // 2, extent], axis=1)
    # true division, as torchvision: int(size * long / short)
    sizes = np.where(extent == short, resize_px, (resize_px * extent / short).astype(np.int64))
    return windows, sizes


def _random_windows(heights_widths: Int, epoch: int, positions: Int, seed: int, augment: Augment) -> Int:
    heights, widths = heights_widths[:, :1], heights_widths[:, 1:]  # (N, 1), against (N, tries)
    streams = STREAM_CROP_TRIES + np.arange(4 * CROP_TRIES)
    draws = uniform_at(seed, epoch, positions[:, None], streams).reshape(-1, CROP_TRIES, 4)

    areas = heights * widths * (augment.scale[0] + draws[..., 0] * (augment.scale[1] - augment.scale[0]))
    low, high = np.log(augment.ratio[0]), np.log(augment.ratio[1])
    ratios = np.exp(low + draws[..., 1] * (high - low))
    w = np.rint(np.sqrt(areas * ratios)).astype(np.int64)
    h = np.rint(np.sqrt(areas / ratios)).astype(np.int64)
    fits = (w > 0) & (w <= widths) & (h > 0) & (h <= heights)

    first = fits.argmax(axis=1)
    rows = np.arange(len(first))
    h, w, found = h[rows, first], w[rows, first], fits[rows, first]
    heights, widths = heights[:, 0], widths[:, 0]

    # no try fitted: the largest centred window whose ratio is allowed
    whole = widths / heights
    fallback_h = np.where(whole < augment.ratio[0], np.rint(widths / augment.ratio[0]), heights)
    fallback_w = np.where(whole > augment.ratio[1], np.rint(heights * augment.ratio[1]), widths)
    h = np.where(found, h, np.clip(fallback_h.astype(np.int64), 1, heights))
    w = np.where(found, w, np.clip(fallback_w.astype(np.int64), 1, widths))
    y = np.where(found, integers_from(draws[rows, first, 2], heights - h + 1), (heights - h) // 2)
    x = np.where(found, integers_from(draws[rows, first, 3], widths - w + 1), (widths - w) // 2)
    return np.stack([y, x, h, w], axis=1)
