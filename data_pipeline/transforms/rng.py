"""Counter-based random numbers: each is a pure function of (seed, epoch, index, stream).

A hash of our own, since NumPy guarantees no Generator the same stream from version to version (NEP 19), and
a resumed run must draw the numbers of the run that it resumes.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

# A stream for each number of a sample. Streams are added, never renumbered: resumed runs depend on them.
STREAM_PERMUTATION = 0
STREAM_FLIP = 1
STREAM_OFFSET_Y = 2
STREAM_OFFSET_X = 3
STREAM_CROP_TRIES = 16  # 16 + 4 * try + (0 area, 1 ratio, 2 y, 3 x), so 16..55
STREAM_JITTER = 64  # 64 + (0 brightness, 1 contrast, 2 saturation, 3 hue)
STREAM_PCA = 72  # 72 + 2 * component + (0 radius, 1 angle), so 72..77
STREAM_MIX = 96  # 96 + (0 whether, 1 which, 2 weight, 3 box y, 4 box x)
STREAM_TRIVIAL = 104  # 104 + (0 operation, 1 magnitude, 2 sign)
STREAM_ERASE = 112
STREAM_ERASE_TRIES = 128  # 128 + 4 * try + (0 area, 1 ratio, 2 y, 3 x), so 128..167
STREAM_BALANCE = 168
_GAMMA = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


def _mix(z: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def hash_at(seed: int, epoch: int, index: npt.ArrayLike, stream: npt.ArrayLike) -> npt.NDArray[np.uint64]:
    """Compute 64 random bits for one number of one sample.

    The splitmix64 finaliser, applied once for each of the four inputs: h = mix(h + gamma * (input + 1)).

    Args:
        seed: the run's seed, any integer (taken modulo 2^64).
        epoch: 0-based.
        index: (...) position or sample number, >= 0.
        stream: (...) which of the sample's numbers, broadcast against `index`.
    Returns:
        (...) uint64, uniform over all values.
    Source: Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators"; Stafford's mix 13.

    >>> hex(int(hash_at(0, 0, 0, 0)[()]))
    '0x2130748aaac80268'
    """
    state = np.zeros((1,), dtype=np.uint64)
    for value in (seed, epoch):
        state = _mix(state + np.uint64((_GAMMA * (value + 1)) & _MASK))
    for values in (index, stream):
        counter = np.atleast_1d(np.asarray(values)).astype(np.uint64)  # scalars warn of overflow
        counter += np.uint64(1)
        state = _mix(state + np.uint64(_GAMMA) * counter)
    return state.reshape(np.broadcast_shapes(np.shape(index), np.shape(stream)))


def uniform_at(seed: int, epoch: int, index: npt.ArrayLike, stream: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Compute a uniform number in [0, 1) with 53 random bits; arguments as `hash_at`."""
    bits = hash_at(seed, epoch, index, stream) >> np.uint64(11)
    return bits.astype(np.float64) * 2.0**-53


def integers_from(
    draws: npt.NDArray[np.float64], count: int | npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """Uniform integers in 0..count - 1 from uniform numbers in [0, 1).

    A product may be rounded up to `count`, hence the minimum.
    """
    return np.minimum((draws * count).astype(np.int64), count - 1)
