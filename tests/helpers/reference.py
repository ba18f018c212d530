"""Slow, plain forms of what the decoders and the device compute, by NumPy or Pillow, for comparison."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from torchvision.transforms.v2 import functional

from data_pipeline.transforms.color import Colors
from data_pipeline.transforms.mix import MixParams
from data_pipeline.transforms.sampler import Int
from data_pipeline.transforms.trivial import Operation, TrivialParams


def apply_colors(images_NHWC: npt.NDArray[np.uint8], colors: Colors) -> npt.NDArray[np.uint8]:
    """Apply a (N, 3, 4) colour matrix to each image, rounded and clipped."""
    linear, offset = colors[:, None, :, :3].astype(np.float64), colors[:, None, None, :, 3]
    exact = images_NHWC.astype(np.float64) @ linear.swapaxes(-1, -2) + offset
    pixels: npt.NDArray[np.uint8] = np.clip(np.rint(exact), 0, 255).astype(np.uint8)
    return pixels


def trivial_images(images_NHWC: npt.NDArray[np.uint8], params: TrivialParams) -> npt.NDArray[np.uint8]:
    """Carry out TrivialAugment's operations by torchvision's functions for Pillow images."""
    changed = [
        np.asarray(trivial_image(Image.fromarray(image), int(operation), float(magnitude)))
        for image, operation, magnitude in zip(images_NHWC, params.operations, params.magnitudes, strict=True)
    ]
    return np.stack(changed)


def trivial_image(image: Any, operation: int, magnitude: float) -> Any:
    """One operation, as `TrivialAugmentWide` of torchvision calls it.

    Args:
        image: for Pillow, or a tensor, (3, H, W) uint8.
    """
    shear = math.degrees(math.atan(magnitude))

    def move(**changes: Any) -> Any:
        still = {"angle": 0.0, "scale": 1.0, "translate": [0, 0], "shear": [0.0, 0.0]}
        return functional.affine(image, **still | changes)

    actions: dict[int, Callable[[], Any]] = {
        Operation.IDENTITY: lambda: image,
        Operation.SHEAR_X: lambda: move(shear=[shear, 0.0], center=[0, 0]),
        Operation.SHEAR_Y: lambda: move(shear=[0.0, shear], center=[0, 0]),
        Operation.TRANSLATE_X: lambda: move(translate=[int(magnitude), 0]),
        Operation.TRANSLATE_Y: lambda: move(translate=[0, int(magnitude)]),
        Operation.ROTATE: lambda: functional.rotate(image, magnitude),
        Operation.BRIGHTNESS: lambda: functional.adjust_brightness(image, 1 + magnitude),
        Operation.COLOR: lambda: functional.adjust_saturation(image, 1 + magnitude),
        Operation.CONTRAST: lambda: functional.adjust_contrast(image, 1 + magnitude),
        Operation.SHARPNESS: lambda: functional.adjust_sharpness(image, 1 + magnitude),
        Operation.POSTERIZE: lambda: functional.posterize(image, int(magnitude)),
        Operation.SOLARIZE: lambda: functional.solarize(image, magnitude),
        Operation.AUTOCONTRAST: lambda: functional.autocontrast(image),
        Operation.EQUALIZE: lambda: functional.equalize(image),
    }
    return actions[operation]()


def erase_images(values_NHWC: npt.NDArray[Any], boxes: Int) -> npt.NDArray[Any]:
    """Set each image's box to 0."""
    erased = values_NHWC.copy()
    for image, (top, left, bottom, right) in zip(erased, boxes, strict=True):
        image[top:bottom, left:right] = 0
    return erased


def mix_images(images_NHWC: npt.NDArray[Any], mix: MixParams) -> npt.NDArray[np.float32]:
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
