"""Colour augmentation: jitter and the paper's PCA noise, as one affine map of RGB for each sample.

Every operation is linear in (R, G, B, 1), so that together they are one 3 x 4 matrix, and pixels are
rounded and clipped once, at the end. The order is brightness, contrast, saturation, hue, PCA.

Two of torchvision's operations are not linear, and differ: its contrast is about the mean gray of each image,
ours about mid-gray (128), as DALI's; its hue turns in HSV, ours in YIQ, as DALI's, which keeps the luma.

Legend: N samples. Matrices act on pixels in 0..255.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from data_pipeline.transforms.augment import Augment
from data_pipeline.transforms.rng import STREAM_JITTER, STREAM_PCA, uniform_at

Float = npt.NDArray[np.float64]
Colors = npt.NDArray[np.float32]

MID_GRAY = 128.0
_YIQ = np.array([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])


def colors_at(seed: int, epoch: int, positions: npt.ArrayLike, augment: Augment) -> Colors | None:
    """The colour matrix of each sample. A sample's numbers depend on (seed, epoch, position) alone.

    Args:
        seed: the run's seed.
        epoch: 0-based.
        positions: (N) places in the epoch's order.
        augment: how far each change may go.
    Returns:
        (N, 3, 4) float32: new RGB = matrix[:, :3] @ RGB + matrix[:, 3]. None where nothing is to change.
    """
    if not augment.colors:
        return None
    positions_N = np.asarray(positions, dtype=np.int64).reshape(-1)
    draws = uniform_at(seed, epoch, positions_N[:, None], STREAM_JITTER + np.arange(4))
    reach = np.array([augment.brightness, augment.contrast, augment.saturation])
    low, high = np.maximum(0.0, 1 - reach), 1 + reach
    factors_N3 = low + draws[:, :3] * (high - low)
    brightness, contrast, saturation = factors_N3.T[..., None, None]  # (N, 1, 1) each
    turns = augment.hue * (2 * draws[:, 3] - 1)

    eye = np.eye(3)
    gray = np.broadcast_to(_YIQ[0], (3, 3))
    linear = brightness * contrast * eye
    offset = np.repeat(MID_GRAY * (1 - contrast[:, 0]), 3, axis=1)
    for step in (saturation * eye + (1 - saturation) * gray, _hue(turns)):
        linear, offset = step @ linear, np.einsum("nij,nj->ni", step, offset)
    offset = offset + _pca_shift(seed, epoch, positions_N, augment)
    return np.concatenate([linear, offset[..., None]], axis=-1).astype(np.float32)


def _hue(turns: Float) -> Float:
    """(N, 3, 3): rotate the plane of I and Q; as in HSV, red turns through yellow to green."""
    angles = -2 * np.pi * turns
    rotation = np.zeros((len(turns), 3, 3))
    rotation[:, 0, 0] = 1
    rotation[:, 1, 1] = rotation[:, 2, 2] = np.cos(angles)
    rotation[:, 2, 1] = np.sin(angles)
    rotation[:, 1, 2] = -np.sin(angles)
    turned: Float = np.linalg.inv(_YIQ) @ rotation @ _YIQ
    return turned


def _pca_shift(seed: int, epoch: int, positions: npt.NDArray[np.int64], augment: Augment) -> Float:
    """(N, 3), in levels of 0..255: the eigenvectors, each times alpha and its eigenvalue."""
    if not augment.pca:
        return np.zeros((len(positions), 3))
    streams = STREAM_PCA + 2 * np.arange(3)
    # standard normal numbers, each from two uniform ones: Box and Muller 1958
    radius = np.sqrt(-2 * np.log1p(-uniform_at(seed, epoch, positions[:, None], streams)))
    angle = 2 * np.pi * uniform_at(seed, epoch, positions[:, None], streams + 1)
    alphas = augment.pca * (radius * np.cos(angle))
    shift: Float = 255 * (alphas * np.array(augment.pca_eigenvalues)) @ np.array(augment.pca_eigenvectors)
    return shift
