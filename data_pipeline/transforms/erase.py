"""Random erasing: chooses a box of each image; the device erases it, after normalising.

Legend: N samples; T tries; top, left, bottom, right in pixels of the crop.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from data_pipeline.transforms.augment import Augment
from data_pipeline.transforms.rng import STREAM_ERASE, STREAM_ERASE_TRIES, integers_from, uniform_at
from data_pipeline.transforms.sampler import Int

ERASE_TRIES = 10
SCALE = (0.02, 0.33)
RATIO = (0.3, 3.3)


def erase_boxes_at(
    seed: int, epoch: int, positions: npt.ArrayLike, augment: Augment, crop_px: int
) -> Int | None:
    """The box of each sample that is erased; it follows from (seed, epoch, position) alone.

    Args:
        seed: the run's seed.
        epoch: 0-based.
        positions: (N) places in the epoch's order.
        augment: its `erase` is the probability.
        crop_px: side of the images.
    Returns:
        (N, 4) int64, top, left, bottom, right; all 0 where nothing is erased. None where the configuration
        erases nothing.
    Source: Zhong et al. 2020; torchvision, `RandomErasing.make_params`: area in `SCALE`, log-uniform height /
        width in `RATIO`, ten tries for a box that is smaller than the image on both sides, else none.
    """
    if not augment.erase:
        return None
    positions_N1 = np.asarray(positions, dtype=np.int64).reshape(-1, 1)
    chosen = uniform_at(seed, epoch, positions_N1[:, 0], STREAM_ERASE) < augment.erase
    streams = STREAM_ERASE_TRIES + np.arange(4 * ERASE_TRIES)
    draws_NT4 = uniform_at(seed, epoch, positions_N1, streams).reshape(-1, ERASE_TRIES, 4)

    areas_NT = crop_px**2 * (SCALE[0] + draws_NT4[..., 0] * (SCALE[1] - SCALE[0]))
    low, high = np.log(RATIO)
    ratios_NT = np.exp(low + draws_NT4[..., 1] * (high - low))
    # np.rint and Python's round both round halves to even
    sides_NT2 = np.rint(np.sqrt(np.stack([areas_NT * ratios_NT, areas_NT / ratios_NT], -1))).astype(np.int64)
    fits_NT = (sides_NT2 < crop_px).all(axis=-1)

    rows, first = np.arange(len(fits_NT)), fits_NT.argmax(axis=1)
    sides_N2 = sides_NT2[rows, first]
    spare_N2 = crop_px - sides_N2
    corners_N2 = integers_from(draws_NT4[rows, first, 2:], spare_N2 + 1)
    boxes_N4 = np.concatenate([corners_N2, corners_N2 + sides_N2], axis=1)
    erased_N = chosen & fits_NT[rows, first]
    return np.where(erased_N[:, None], boxes_N4, 0)
