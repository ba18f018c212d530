"""Which random changes training makes to an image, and how far each may go."""

from __future__ import annotations

import math
from typing import Literal

import msgspec

Crop = Literal["random_resized", "random", "center"]


class Augment(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Training augmentation.

    Args:
        crop: "random_resized" takes a window of random area and shape and resizes it to the crop;
            "random" resizes the short side and cuts the crop anywhere, as the paper; "center" its middle.
        scale: smallest and largest window as a fraction of the image's area, 0 < low <= high <= 1.
        ratio: smallest and largest width / height of the window, 0 < low <= high.
        flip: probability of mirroring left and right, 0..1. Digits and text must not be mirrored: 0.
    Raises:
        ValueError: a value outside its range.
    Source: Krizhevsky et al. 2012, section 4.1 ("random"); Szegedy et al. 2014, section 6 ("random_resized").
    """

    crop: Crop = "random_resized"
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"scale must be two numbers with 0 < low <= high <= 1, not {self.scale}")
        if not 0 < self.ratio[0] <= self.ratio[1] or not math.isfinite(self.ratio[1]):
            raise ValueError(f"ratio must be two finite numbers with 0 < low <= high, not {self.ratio}")
        if not 0 <= self.flip <= 1:
            raise ValueError(f"flip is a probability, 0 to 1, not {self.flip}")
