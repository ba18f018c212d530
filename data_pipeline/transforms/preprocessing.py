"""The preprocessing contract: one frozen value that training, evaluation, export and prediction share.

It is saved in every checkpoint and every exported bundle, so that nobody passes mean, std or sizes by hand.
A model's input is always uint8 RGB, NHWC; `mean` and `std` are applied inside the model.
"""

from __future__ import annotations

import math
from typing import Annotated

import msgspec

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Pixels = Annotated[int, msgspec.Meta(ge=8, le=4096)]


class Preprocessing(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Turns an encoded image into the model's input, the same way everywhere.

    An image is decoded to 8-bit RGB, turned upright by its EXIF orientation, resized (bilinear with
    antialiasing, as Pillow and torchvision do) so that its short side is `resize_px`, and cropped to the
    centre `crop_px` square. The model then computes `(pixel / 255 - mean) / std`.

    Attributes:
        resize_px: short side before the evaluation crop, in pixels.
        crop_px: side of the square that the model sees, in pixels, at most `resize_px`.
        mean: per-channel mean (RGB), in units of 0..1.
        std: per-channel standard deviation (RGB), in units of 0..1, each > 0.
        max_pixels: images with more pixels than this, by their header, are refused before decoding.
    Raises:
        ValueError: a crop larger than the resized image, or a std that is not positive.
    Source: Krizhevsky et al. 2012, section 2 (256, centre crop); torchvision's references (mean, std).
    """

    resize_px: Pixels = 256
    crop_px: Pixels = 224
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    max_pixels: Annotated[int, msgspec.Meta(ge=1)] = 100_000_000

    def __post_init__(self) -> None:
        if self.crop_px > self.resize_px:
            raise ValueError(f"crop_px {self.crop_px} is larger than resize_px {self.resize_px}")
        if not all(math.isfinite(m) for m in self.mean):
            raise ValueError(f"mean must be three finite numbers, not {self.mean}")
        if not all(math.isfinite(s) and s > 0 for s in self.std):
            raise ValueError(f"std must be three numbers above 0, not {self.std}")


def describe_preprocessing(preprocessing: Preprocessing) -> str:
    """The preprocessing in words and numbers, for people who feed a model themselves."""
    of = preprocessing
    mean, std = (", ".join(f"{value:.6g}" for value in values) for values in (of.mean, of.std))
    return (
        "Decode to 8-bit RGB and turn it upright by its EXIF orientation; resize (bilinear with "
        f"antialiasing, as Pillow's `BILINEAR`) so that the short side has {of.resize_px} pixels; cut the "
        f"centre square of {of.crop_px} x {of.crop_px}. Then `(pixel / 255 - mean) / std` for R, G, B with "
        f"mean {mean} and std {std}."
    )
