"""Random erasing on the device: a box of zeros, as NumPy sets it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.helpers.reference import erase_images
from train.inputs.erase import erase_inputs

BOXES = np.array([[0, 0, 0, 0], [0, 0, 3, 5], [2, 1, 9, 2], [4, 4, 9, 7]])


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_box_is_erased_and_nothing_else(device: str) -> None:
    values = np.random.default_rng(0).normal(size=(4, 9, 7, 3)).astype(np.float32)
    inputs = torch.from_numpy(values).permute(0, 3, 1, 2).to(device)
    erased = erase_inputs(inputs, torch.from_numpy(BOXES).to(device))
    assert erased.is_contiguous(memory_format=torch.channels_last)
    assert np.array_equal(erased.permute(0, 2, 3, 1).cpu().numpy(), erase_images(values, BOXES))
    assert int((erased == 0).sum()) == 3 * (15 + 7 + 15) and not (inputs == 0).any()
