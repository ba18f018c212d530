"""Slow, plain NumPy forms of what the decoders and the device compute, for comparison."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from data_pipeline.transforms.color import Colors
from data_pipeline.transforms.mix import MixParams


def apply_colors(images_NHWC: npt.NDArray[np.uint8], colors: Colors) -> npt.NDArray[np.uint8]:
    """Apply a (N, 3, 4) colour matrix to each image, rounded and clipped."""
    linear, offset = colors[:, None, :, :3].astype(np.float64), colors[:, None, None, :, 3]
    exact = images_NHWC.astype(np.float64) @ linear.swapaxes(-1, -2) + offset
    pixels: npt.NDArray[np.uint8] = np.clip(np.rint(exact), 0, 255).astype(np.uint8)
    return pixels


def mix_images(images_NHWC: npt.NDArray[np.uint8], mix: MixParams) -> npt.NDArray[np.float32]:
    """Mix images: weight * own + (1 - weight) * partner outside the box, the partner inside; not rounded."""
    own = images_NHWC.astype(np.float32)
    shares = pixel_weights(mix, images_NHWC.shape[1], images_NHWC.shape[2])[..., None]
    mixed: npt.NDArray[np.float32] = shares * own + (1 - shares) * own[mix.partners]
    return mixed


def pixel_weights(mix: MixParams, height: int, width: int) -> npt.NDArray[np.float32]:
    """(N, height, width): the weight of its own image in each pixel."""
    top, left, bottom, right = (mix.boxes[:, i, None] for i in range(4))
    y, x = np.arange(height), np.arange(width)
    rows, columns = (y >= top) & (y < bottom), (x >= left) & (x < right)
    inside = rows[:, :, None] & columns[:, None, :]
    return np.where(inside, np.float32(0), mix.weights[:, None, None])


def mix_labels(labels_N: npt.NDArray[np.int64], mix: MixParams, num_classes: int) -> npt.NDArray[np.float32]:
    """Soft targets, (N, num_classes): each label by its weight; rows sum to 1."""
    one_hot = np.eye(num_classes, dtype=np.float32)[labels_N]
    share = mix.label_weights[:, None]
    targets: npt.NDArray[np.float32] = share * one_hot + (1 - share) * one_hot[mix.partners]
    return targets
