"""Sums over pixels: exact integers, however many images."""

from __future__ import annotations

import numpy as np
import pytest

from data_pipeline.inspect.pixel_stats import PixelSums


def test_pixel_sums_stay_exact_where_floats_would_not() -> None:
    """A million images' worth of two neighbouring levels: a variance of 1/4 beside sums of 10^17."""
    sums = PixelSums()
    image = np.full((512, 1024, 3), 254, dtype=np.uint8)
    image[::2] = 255
    sums.add(image)
    for _ in range(20):
        other = PixelSums(sums.products.copy(), sums.num_images)
        sums.merge(other)
    found = sums.statistics()
    assert (found.num_images, found.num_pixels) == (1 << 20, 512 * 1024 << 20)
    assert found.mean == (254.5 / 255,) * 3 and found.std == pytest.approx((0.5 / 255,) * 3, rel=1e-15)
    assert found.eigenvalues == pytest.approx((3 / 4 / 255**2, 0, 0), rel=1e-12, abs=1e-18)
