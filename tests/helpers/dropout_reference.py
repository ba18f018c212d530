"""Dropout masks as their recipe says, in unsigned arithmetic and apart from the network's code."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

GAMMA, ALL_BITS = 0x9E3779B97F4A7C15, (1 << 64) - 1


def mix64(z: int) -> int:
    """The finaliser of splitmix64."""
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & ALL_BITS
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & ALL_BITS
    return z ^ (z >> 31)


def layer_key(seed: int, step: int, layer: int) -> tuple[int, int]:
    """The two unsigned words of a layer, in Python's own integers."""
    state = 0
    for value in (seed, step, layer, 1 << 32):
        state = mix64((state + GAMMA * (value + 1)) & ALL_BITS)
    return state & 0xFFFFFFFF, state >> 32


def mix32(h: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
    """`lowbias32`, the whole of it."""
    h = (h ^ (h >> np.uint32(16))) * np.uint32(0x7FEB352D)
    h = (h ^ (h >> np.uint32(15))) * np.uint32(0x846CA68B)
    return h ^ (h >> np.uint32(16))


def kept_units(
    seed: int, step: int, layer: int, rows: Sequence[int] | npt.NDArray[np.int64], units: range, p: float
) -> npt.NDArray[np.bool_]:
    """Which units of the samples at some positions are kept: (N, D)."""
    key_0, key_1 = layer_key(seed, step, layer)
    rows_N1 = np.array(rows, np.uint32)[:, None]
    units_D = np.array([(unit * 0x9E3779B9 + key_1) & 0xFFFFFFFF for unit in units], np.uint32)
    h_ND = mix32(rows_N1 ^ np.uint32(key_0)) ^ units_D
    h_ND = (h_ND ^ (h_ND >> np.uint32(16))) * np.uint32(0x7FEB352D)
    h_ND = (h_ND ^ (h_ND >> np.uint32(15))) * np.uint32(0x846CA68B)
    # signed numbers are in the order of unsigned ones whose first bit is turned over
    kept: npt.NDArray[np.bool_] = (h_ND ^ np.uint32(1 << 31)) >= np.uint32(int(p * 2**32))
    return kept
