"""TrivialAugment: chooses an operation and its strength for each image; the device carries it out.

Of `Operation` each is as likely as the others, and one of 31 strengths from none to the strongest, which are
those of the paper's "wide" space. Shears, translations, the rotation and the enhancements (brightness to
sharpness) have a sign, positive or negative.

Legend: N samples; O operations; B strengths.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from data_pipeline.transforms.augment import Augment
from data_pipeline.transforms.rng import STREAM_TRIVIAL, integers_from, uniform_at
from data_pipeline.transforms.sampler import Int

Float = npt.NDArray[np.float64]

NUM_STRENGTHS = 31


class Operation(IntEnum):
    """The operations of TrivialAugment, and the meaning of their magnitudes."""

    IDENTITY = 0  # nothing
    SHEAR_X = 1  # each row is moved to the left by so many times its y: -0.99..0.99
    SHEAR_Y = 2  # each column is moved up by so many times its x
    TRANSLATE_X = 3  # whole pixels to the right: -32..32, whatever the size of the image
    TRANSLATE_Y = 4  # down
    ROTATE = 5  # degrees against the clock, about the centre: -135..135
    BRIGHTNESS = 6  # a factor less 1: -0.99..0.99; 0 leaves the image, -1 were black
    COLOR = 7  # -1 were gray
    CONTRAST = 8  # -1 were the image's mean gray
    SHARPNESS = 9  # -1 were the image smoothed by 3 x 3 pixels
    POSTERIZE = 10  # upper bits that are kept: 8..2
    SOLARIZE = 11  # the lowest level that is inverted: 255..0
    AUTOCONTRAST = 12  # nothing: each channel is stretched to 0..255
    EQUALIZE = 13  # nothing: the histogram of each channel is made even


@dataclass(frozen=True, eq=False)
class TrivialParams:
    """The operation and magnitude for each image of a batch.

    Attributes:
        operations: (N) int64, values of `Operation`.
        magnitudes: (N) float64, see `Operation`; 0 for those that have none.
    """

    operations: Int
    magnitudes: Float

    def __len__(self) -> int:
        return len(self.operations)


def trivial_params_at(
    seed: int, epoch: int, positions: npt.ArrayLike, augment: Augment
) -> TrivialParams | None:
    """The operation of each sample; it follows from (seed, epoch, position) alone.

    Args:
        seed: the run's seed.
        epoch: 0-based.
        positions: (N) places in the epoch's order.
        augment: whether there is any.
    Returns:
        The operations; None where the configuration has none.
    Source: Müller and Hutter 2021, table 1 ("wide") and section 3; torchvision, `TrivialAugmentWide`.
    """
    if not augment.trivial:
        return None
    positions_N1 = np.asarray(positions, dtype=np.int64).reshape(-1, 1)
    which, strength, sign = uniform_at(seed, epoch, positions_N1, STREAM_TRIVIAL + np.arange(3)).T
    operations = integers_from(which, len(Operation))
    magnitudes = _MAGNITUDES_OB[operations, integers_from(strength, NUM_STRENGTHS)]
    negative = (sign < 0.5) & (operations >= Operation.SHEAR_X) & (operations <= Operation.SHARPNESS)
    return TrivialParams(operations, np.where(negative, -magnitudes, magnitudes))


def _tabulate() -> Float:
    """(O, B): the magnitude of each operation at each strength, without its sign."""
    table_OB = np.zeros((len(Operation), NUM_STRENGTHS))
    strengths = np.arange(NUM_STRENGTHS)
    last = NUM_STRENGTHS - 1
    table_OB[[Operation.SHEAR_X, Operation.SHEAR_Y]] = 0.99 * strengths / last
    table_OB[[Operation.TRANSLATE_X, Operation.TRANSLATE_Y]] = 32 * strengths // last
    table_OB[Operation.ROTATE] = 135 * strengths / last
    table_OB[Operation.BRIGHTNESS : Operation.SHARPNESS + 1] = 0.99 * strengths / last
    table_OB[Operation.POSTERIZE] = 8 - np.rint(6 * strengths / last)
    table_OB[Operation.SOLARIZE] = 255 * (last - strengths) / last
    return table_OB


_MAGNITUDES_OB = _tabulate()
