"""Configures the random changes that training makes to an image, and their ranges."""

from __future__ import annotations

import math
from typing import Literal

import msgspec

Crop = Literal["random_resized", "random", "random_square", "padded", "center"]
Triple = tuple[float, float, float]

IMAGENET_EIGENVALUES: Triple = (0.2175, 0.0188, 0.0045)
IMAGENET_EIGENVECTORS: tuple[Triple, Triple, Triple] = (
    (-0.5675, -0.5808, -0.5836),
    (0.7192, -0.0045, -0.6948),
    (0.4009, -0.8140, 0.4203),
)


class Augment(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Training augmentation. An operation whose value is 0 is off, and costs nothing.

    Attributes:
        crop: "random_resized" resizes a window of random area and shape to the crop; "random" resizes the
            short side and crops anywhere; "random_square" anywhere in the centre `resize_px` square, as the
            paper; "padded" as "random" after a black border of an eighth of the crop; "center" the middle.
        scale: smallest and largest window as a fraction of the image's area, 0 < low <= high <= 1.
        ratio: smallest and largest width / height of the window, 0 < low <= high.
        flip: probability of mirroring left and right, 0..1. Digits and text must not be mirrored: 0.
        brightness: factor drawn from [max(0, 1 - b), 1 + b]; b >= 0.
        contrast: the same, about mid-gray.
        saturation: the same, about the pixel's own gray.
        hue: rotation of the colours, drawn from [-h, h] of a full circle; 0 <= h <= 0.5.
        pca: the paper's colour noise: standard deviation of the factor on each eigenvalue; there, 0.1.
        pca_eigenvalues: of the covariance of the training set's RGB, in units of 0..1.
        pca_eigenvectors: one for each eigenvalue, (R, G, B), each of length 1.
        trivial: TrivialAugment: one of 14 operations on each image, of random strength; see
            `data_pipeline.transforms.trivial`.
        erase: probability of erasing a box of the image to the mean colour, 0..1; 0.1 is usual.
        mixup: alpha of the Beta distribution by which two images are blended; 0.2 is usual.
        cutmix: alpha for pasting a box of one image into another; 1 is usual. With both, half and half.
        mix_probability: share of the samples that are mixed at all, 0..1.
    Raises:
        ValueError: a value outside its range.
    Source: Krizhevsky et al. 2012, section 4.1 ("random_square", PCA); Szegedy et al. 2014, section 6
        ("random_resized"); He et al. 2016, section 4.2 ("padded": 4 pixels for 32); fb.resnet.torch
        (ImageNet's eigenvalues); torchvision's ColorJitter (ranges); Müller and Hutter 2021 (TrivialAugment);
        Zhong et al. 2020 (random erasing); Zhang et al. 2018 (MixUp); Yun et al. 2019 (CutMix).
    """

    crop: Crop = "random_resized"
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    pca: float = 0.0
    pca_eigenvalues: Triple = IMAGENET_EIGENVALUES
    pca_eigenvectors: tuple[Triple, Triple, Triple] = IMAGENET_EIGENVECTORS
    trivial: bool = False
    erase: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    mix_probability: float = 1.0

    @property
    def colors(self) -> bool:
        """Whether any image changes its colours."""
        return any((self.brightness, self.contrast, self.saturation, self.hue, self.pca))

    @property
    def mixes(self) -> bool:
        """Whether images are mixed with one another."""
        return bool(self.mixup or self.cutmix) and self.mix_probability > 0

    def __post_init__(self) -> None:
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"scale must be two numbers with 0 < low <= high <= 1, not {self.scale}")
        if not 0 < self.ratio[0] <= self.ratio[1] or not math.isfinite(self.ratio[1]):
            raise ValueError(f"ratio must be two finite numbers with 0 < low <= high, not {self.ratio}")
        for name in ("flip", "erase", "mix_probability"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a probability, 0 to 1, not {getattr(self, name)}")
        for name in ("brightness", "contrast", "saturation", "hue", "pca"):
            value, highest = getattr(self, name), 0.5 if name == "hue" else 10
            if not 0 <= value <= highest:
                raise ValueError(f"{name} must be 0 (off) to {highest}, not {value}")
        for name in ("mixup", "cutmix"):
            value = getattr(self, name)
            if value != 0 and not 0.05 <= value <= 100:
                raise ValueError(
                    f"{name} is a Beta distribution's alpha: 0 (off), or 0.05 to 100, not {value}"
                )
        if not all(0 <= value <= 1 for value in self.pca_eigenvalues):
            raise ValueError(f"pca_eigenvalues are variances in units of 0..1, not {self.pca_eigenvalues}")
        for vector in self.pca_eigenvectors:
            if not math.isclose(math.hypot(*vector), 1, abs_tol=0.01):
                raise ValueError(f"each of pca_eigenvectors must be of length 1, not {vector}")
