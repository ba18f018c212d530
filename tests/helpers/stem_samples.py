"""Images and what is done to them, for the tests of the first convolution's inputs."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from data_pipeline.transforms.mix import MixParams
from data_pipeline.transforms.preprocessing import Preprocessing
from train.inputs.mixup import MixInputs

# Shapes: N samples, H and W rows and columns.

PREPROCESSING = Preprocessing()
ERASED = np.array([[0, 0, 0, 0], [0, 0, 3, 5], [2, 1, 9, 2], [4, 4, 9, 7]])
"""Of four images, of 9 pixels and more."""
MIX = MixParams(
    partners=np.array([1, 0, 3, 2]),
    weights=np.array([0.25, 0.8, 1, 1], dtype=np.float32),  # two are mixed, two are cut
    boxes=np.array([[0, 0, 0, 0], [0, 0, 0, 0], [1, 2, 6, 9], [0, 0, 0, 0]]),
    label_weights=np.array([0.25, 0.8, 0.6, 1], dtype=np.float32),
)


def mix_on_device(plan: MixParams, device: str | torch.device = "cpu") -> MixInputs:
    """Return a plan as tensors on a device."""
    return MixInputs(**{name: torch.from_numpy(a).to(device) for name, a in vars(plan).items()})


def uint8_images(num: int, side: int) -> Tensor:
    """Noise, (num, side, side, 3), with both ends of the levels in it."""
    images_NHWC = torch.randint(0, 256, (num, side, side, 3), generator=torch.Generator().manual_seed(side))
    images_NHWC[0, 0, 0], images_NHWC[-1, -1, -1] = 0, 255
    return images_NHWC.to(torch.uint8)
