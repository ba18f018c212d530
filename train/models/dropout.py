"""Dropout whose masks are a function of (seed, step, layer, position of the sample, unit).

No generator with a state: a mask depends neither on the number of ranks nor on how a batch is split over them
and their micro-batches, and is the same on every device, in every mode and in a resumed run.

The recipe, in unsigned 32-bit arithmetic that wraps, for a kernel that makes masks itself:

    key_0, key_1 = keys_L2[layer]                  # of the step: `layer_keys_at`
    row_word  = mix32(row ^ key_0)                 # row: the sample's position in the epoch's order
    unit_word = unit * UNIT_STEP + key_1           # unit: its index in the whole layer
    h = row_word ^ unit_word
    h = (h ^ (h >> 16)) * MIX_1
    h = (h ^ (h >> 15)) * MIX_2                    # mix32 without its last line
    dropped where int32(h) < threshold_at(p)       # compared as signed numbers

    mix32(h): the two lines above, and then h ^ (h >> 16)

A shift of a signed number is arithmetic: mask its upper bits afterwards. `mix32` without its last line is
still one to one, so P(dropped) is p to 2^-32, and that line would not change the upper bits, which decide.
The words are not added: rows whose words differ by a few times UNIT_STEP would have the same mask, shifted.

Source: Srivastava et al. 2014, "Dropout" (in the form that scales in training); `lowbias32` of Wellons 2018,
"Prospecting for hash functions" (the finaliser); Salmon et al. 2011, "Parallel random numbers: as easy as
1, 2, 3" (numbers from counters).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from data_pipeline.transforms.rng import hash_at

# Shapes: N samples of a pass; B those of all ranks, in layers that are split; L dropout layers; D units.

DROPOUT_STREAM = 1 << 32
"""Far from the streams of `data_pipeline.transforms.rng`, so that no mask repeats a crop's number."""
UNIT_STEP = 0x9E3779B9
"""2^32 over the golden ratio: neighbouring units get words that are far apart."""
MIX_1, MIX_2 = 0x7FEB352D, 0x846CA68B
IN_CACHE = 1 << 16
"""Elements of a mask that a CPU makes at once: two arrays of this many int32 stay in a core's cache."""


def layer_keys_at(seed: int, step: int, num_layers: int) -> npt.NDArray[np.int32]:
    """Compute the two words of each dropout layer from which its masks of one step follow.

    Args:
        seed: the run's.
        step: optimiser steps finished before this one.
        num_layers: L.
    Returns:
        (L, 2) int32, the lower and the upper half of 64 random bits.

    >>> layer_keys_at(0, 0, 2).shape
    (2, 2)
    """
    words_L = hash_at(seed, step, np.arange(num_layers), DROPOUT_STREAM)
    lower_L, upper_L = words_L & np.uint64(0xFFFFFFFF), words_L >> np.uint64(32)
    return np.stack([lower_L, upper_L], axis=1).astype(np.uint32).view(np.int32)


def threshold_at(p: float) -> int:
    """Return the signed 32-bit number below which a hash drops its unit.

    Args:
        p: probability of a drop, in [0, 1).

    >>> threshold_at(0.0), threshold_at(0.5)
    (-2147483648, 0)
    """
    return int(p * 2**32) - 2**31


class Masks:
    """Inputs of the masks of all dropout layers of a network, beside the unit.

    A step writes the keys once and the rows once a pass; whoever keeps tensors of its own, for a graph that
    was captured, sets them here and writes into them.

    Attributes:
        keys_L2: int32, of the step, on the network's device: see `layer_keys_at`.
        rows_N: int32, the positions of the pass's samples in the epoch's order, on the device. None outside
            of a step: the rows are 0 to N - 1.
        rows_B: int32, the same of the samples of all ranks, for layers that are split over them; None as
            `rows_N`.
    """

    def __init__(self, num_layers: int) -> None:
        self.keys_L2: Tensor = torch.from_numpy(layer_keys_at(0, 0, num_layers))
        self.rows_N: Tensor | None = None
        self.rows_B: Tensor | None = None

    def rows_for(self, input_ND: Tensor, split: bool = False) -> Tensor:
        """Return the rows of a layer's samples; of the samples of all ranks if the layer is split."""
        rows_N = self.rows_B if split else self.rows_N
        if rows_N is None:
            rows_N = torch.arange(len(input_ND), dtype=torch.int32, device=input_ND.device)
        assert len(rows_N) == len(input_ND), "the rows of the masks are those of another pass"
        return rows_N

    def start_outside_of_steps(self, num_samples: int, device: torch.device) -> None:
        """Set keys and rows on a device as a step does, for passes that are only timed."""
        self.keys_L2 = self.keys_L2.to(device)
        self.rows_N = torch.arange(num_samples, dtype=torch.int32, device=device)


class Dropout(nn.Module):
    """Sets units to 0 with probability p and scales the others by 1 / (1 - p), in training alone.

    Shape:
        (N, D) -> (N, D), of the same type.

    Args:
        p: probability of a drop, in [0, 1).
        layer: which of the network's dropout layers this is, 0-based.
        masks: shared by all dropout layers of a network.
    Attributes:
        first_unit: of a layer that is split over the ranks, the index in the whole layer of the first unit
            here; its samples are then those of all ranks. None for a whole layer.
    """

    def __init__(self, p: float, layer: int, masks: Masks) -> None:
        super().__init__()
        self.p, self.layer, self.masks = p, layer, masks
        self.first_unit: int | None = None

    def extra_repr(self) -> str:
        """Return what `print(network)` shows of the layer."""
        return f"p={self.p}, layer={self.layer}"

    def forward(self, input_ND: Tensor) -> Tensor:
        """Drop units; a mask of one byte an element is kept for the backward pass."""
        if not self.training or self.p == 0:
            return input_ND
        rows_N = self.masks.rows_for(input_ND, split=self.first_unit is not None)
        keys_2 = self.masks.keys_L2[self.layer].to(input_ND.device)
        kept_ND = kept_at(rows_N, keys_2, input_ND.shape[1], self.p, self.first_unit or 0)
        return input_ND.mul(kept_ND).mul_(1 / (1 - self.p))  # filling by a mask takes a CPU 3 times as long


def masks_of(network: nn.Module) -> Masks:
    """Return what the masks of a network follow from."""
    return next(module.masks for module in network.modules() if isinstance(module, Dropout))


def kept_at(rows_N: Tensor, keys_2: Tensor, num_units: int, p: float, first_unit: int = 0) -> Tensor:
    """Compute which units of which samples are kept, by the recipe at the top of this file.

    Args:
        rows_N: int32, positions of the samples in the epoch's order.
        keys_2: int32, of the step and layer.
        num_units: D, how many units from `first_unit` on.
        p: probability of a drop, in [0, 1).
    Returns:
        (N, D) bool on the device of `rows_N`.
    """
    row_words_N = _mixed(rows_N ^ keys_2[0])
    row_words_N ^= _shifted(row_words_N, 16)
    units_D = torch.arange(first_unit, first_unit + num_units, dtype=torch.int32, device=rows_N.device)
    unit_words_D = units_D * _signed(UNIT_STEP) + keys_2[1]
    at_once = len(rows_N)
    if not rows_N.is_cuda and not torch.compiler.is_compiling():
        at_once = IN_CACHE // num_units  # a compiler makes one loop of it all, and a GPU wants few launches
    parts = [
        _mixed(words_N[:, None] ^ unit_words_D) >= threshold_at(p)
        for words_N in torch.split(row_words_N, max(1, at_once))
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _mixed(words: Tensor) -> Tensor:
    """Mix int32 words in place: `lowbias32` without its last line."""
    words ^= _shifted(words, 16)
    words *= _signed(MIX_1)
    words ^= _shifted(words, 15)
    words *= _signed(MIX_2)
    return words


def _shifted(words: Tensor, bits: int) -> Tensor:
    """Shift int32 words to the right as unsigned ones."""
    shifted = words >> bits
    shifted &= (1 << (32 - bits)) - 1
    return shifted


def _signed(word: int) -> int:
    """Return the int32 with the bits of an unsigned word."""
    return word - (1 << 32) if word >= 1 << 31 else word
