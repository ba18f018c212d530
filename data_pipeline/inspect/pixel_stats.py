"""Computes mean, deviation and principal components of RGB over millions of images, from exact sums."""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec
import numpy as np
import numpy.typing as npt

Float = npt.NDArray[np.float64]

_BLOCK_PIXELS = 1 << 18
"""Pixels summed at once: 8 MB as float64, in which sums of products of 8-bit numbers are exact."""


class PixelStatistics(msgspec.Struct, frozen=True, kw_only=True):
    """Statistics of RGB over all pixels of all images, in units of 0..1.

    Attributes:
        mean: of each channel.
        std: of each channel, of the population.
        covariance: of the channels.
        eigenvalues: of the covariance, the largest first: variances.
        eigenvectors: one for each eigenvalue, (R, G, B), of length 1, its largest part positive.
    """

    num_images: int
    num_pixels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    covariance: tuple[tuple[float, ...], ...]
    eigenvalues: tuple[float, ...]
    eigenvectors: tuple[tuple[float, ...], ...]


@dataclass
class PixelSums:
    """Sums over pixels (R, G, B, 1) of each pair's product, as Python's integers, which have no limit.

    Attributes:
        products: (4, 4); the last row holds the sums and the number of pixels.
        num_images: images added.
    """

    products: npt.NDArray[np.object_] = field(default_factory=lambda: np.zeros((4, 4), dtype=object))
    num_images: int = 0

    def add(self, image_HWC: npt.NDArray[np.uint8]) -> None:
        """Add every pixel of an image."""
        pixels = image_HWC.reshape(-1, 3)
        for first in range(0, len(pixels), _BLOCK_PIXELS):
            block = pixels[first : first + _BLOCK_PIXELS]
            planes = np.ones((4, len(block)))
            planes[:3] = block.T
            self.products += np.rint(planes @ planes.T).astype(np.int64).astype(object)
        self.num_images += 1

    def merge(self, other: PixelSums) -> None:
        """Add another's sums."""
        self.products += other.products
        self.num_images += other.num_images

    def statistics(self) -> PixelStatistics:
        """Compute the statistics; at least one image must have been added.

        Source: Krizhevsky et al. 2012, section 4.1: principal components of the training set's RGB values.
        """
        count, sums = self.products[3, 3], self.products[3, :3]
        # n * sum(xy) - sum(x) * sum(y) in integers: nothing cancels in floating point
        exact = (count * self.products[:3, :3] - np.outer(sums, sums)) / (255 * count) ** 2
        covariance = exact.astype(np.float64)
        values, columns = np.linalg.eigh(covariance)
        vectors = columns.T[::-1]
        vectors = vectors * np.sign(vectors[np.arange(3), np.abs(vectors).argmax(axis=1)])[:, None]
        return PixelStatistics(
            num_images=self.num_images,
            num_pixels=count,
            mean=tuple(value / (255 * count) for value in sums),
            std=tuple(np.sqrt(np.diag(covariance)).tolist()),
            covariance=tuple(map(tuple, covariance.tolist())),
            eigenvalues=tuple(np.maximum(values[::-1], 0).tolist()),
            eigenvectors=tuple(map(tuple, vectors.tolist())),
        )
