"""MixUp and CutMix: chooses which two samples are mixed, and how; the device mixes them.

A sample's partner is its neighbour in the step: places 2i and 2i + 1 of the global batch are a pair. Ranks
and micro-batches never split a pair (`sampler.rank_slice` in groups of 2), so the parameters are the same for
any number of them, no data moves between ranks, and no image is decoded twice. The price is that a rank's
share of a step is a whole number of pairs. As the order is a new permutation each epoch, so are the pairs.

Legend: N samples; y, x, height, width in pixels of the crop.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from data_pipeline.transforms.augment import Augment
from data_pipeline.transforms.rng import STREAM_MIX, integers_from, uniform_at
from data_pipeline.transforms.sampler import Int

Float = npt.NDArray[np.float64]
Weights = npt.NDArray[np.float32]

PAIR_SIZE = 2


@dataclass(frozen=True, eq=False)
class MixParams:
    """The parameters by which each sample of a batch is mixed with another of the same batch.

    Attributes:
        partners: (N) int64, place of the other sample in the batch; its own place where there is none.
        weights: (N) float32, share of the sample's own pixels outside its box; 1 for CutMix.
        boxes: (N, 4) int64, top, left, bottom, right: inside, the pixels are the partner's. Empty for MixUp.
        label_weights: (N) float32, share of the sample's own label; for CutMix the area outside the box.
    """

    partners: Int
    weights: Weights
    boxes: Int
    label_weights: Weights

    def __len__(self) -> int:
        return len(self.partners)

    def drop_invalid(self, valid: npt.NDArray[np.bool_]) -> MixParams:
        """The parameters without the pairs in which a sample is not valid: both stay as they are."""
        whole = valid & valid[self.partners]
        return MixParams(
            np.where(whole, self.partners, np.arange(len(self))),
            np.where(whole, self.weights, np.float32(1)),
            np.where(whole[:, None], self.boxes, 0),
            np.where(whole, self.label_weights, np.float32(1)),
        )


def mix_params_at(
    seed: int, epoch: int, positions: npt.ArrayLike, augment: Augment, crop_px: int
) -> MixParams | None:
    """The parameters for consecutive positions that begin with a pair; each follows from its position alone.

    Args:
        seed: the run's seed.
        epoch: 0-based.
        positions: (N) consecutive places in the epoch's order. The last of an odd number stays as it is.
        augment: the kinds of mixing, and their probability.
        crop_px: side of the images.
    Returns:
        The parameters; None where the configuration mixes nothing.
    Source: Zhang et al. 2018 (MixUp); Yun et al. 2019, section 3.1 (CutMix's box), with the area that is left
        of the box inside the image as the label's weight.
    """
    if not augment.mixes:
        return None
    positions_N = np.asarray(positions, dtype=np.int64).reshape(-1)
    own = np.arange(len(positions_N))
    partners = own ^ 1
    alone = partners >= len(own)
    partners = np.where(alone, own, partners)

    draws = uniform_at(seed, epoch, positions_N[:, None], STREAM_MIX + np.arange(5))
    whether, which, share = draws[:, :3].T
    mixed = (whether < augment.mix_probability) & ~alone
    share_of_mixup = 0.5 if augment.mixup and augment.cutmix else float(bool(augment.mixup))
    blended = mixed & (which < share_of_mixup)
    pasted = mixed & ~blended

    weights = np.ones(len(own), dtype=np.float32)
    if augment.mixup:
        weights[blended] = beta_quantile(share[blended], augment.mixup)
    boxes = np.zeros((len(own), 4), dtype=np.int64)
    if augment.cutmix:
        kept = beta_quantile(share[pasted], augment.cutmix)
        boxes[pasted] = _boxes(kept, draws[pasted, 3:].T, crop_px)
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    label_weights = (weights * (1 - area / crop_px**2)).astype(np.float32)
    return MixParams(partners, weights, boxes, label_weights)


def beta_quantile(draws: Float, alpha: float) -> Float:
    """The quantile function of Beta(alpha, alpha): a Beta-distributed number for each uniform one.

    Args:
        draws: uniform in [0, 1).
        alpha: > 0.
    Returns:
        As many numbers in 0..1. They come from a table, whose error grows as alpha falls: at alpha 0.2 the
        distribution is met to 3e-4, at 0.05 to 0.08.

    >>> beta_quantile(np.array([0.25, 0.5]), 1.0).round(6).tolist()
    [0.25, 0.5]
    """
    probabilities, values = _lower_half(alpha)
    folded = np.minimum(draws, 1 - draws)
    lower = np.interp(folded, probabilities, values) ** (1 / min(alpha, 1.0))
    return np.where(draws < 0.5, lower, 1 - lower)


@lru_cache(maxsize=4)
def _lower_half(alpha: float) -> tuple[Float, Float]:
    """Tabulate probabilities 0..0.5 and their quantiles x, as x^alpha where alpha < 1.

    For alpha < 1 the density x^(alpha-1) (1-x)^(alpha-1) is unbounded at 0; the density of x^alpha is not.
    """
    power = min(alpha, 1.0)
    values = np.linspace(0, 0.5**power, 8193)
    x = values ** (1 / power)
    density = (x * (1 - x)) ** (alpha - 1) if alpha >= 1 else (1 - x) ** (alpha - 1)
    mass = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return 0.5 * mass / mass[-1], values


def _boxes(kept: Float, draws_yx: Float, crop_px: int) -> Int:
    """(N, 4) boxes of the crop's shape and of area 1 - kept, centred on any pixel, clipped at the border."""
    side = (crop_px * np.sqrt(1 - kept)).astype(np.int64)
    top_left = integers_from(draws_yx, crop_px) - side // 2
    edges: Int = np.clip(np.concatenate([top_left, top_left + side]), 0, crop_px)
    return edges.T
