"""Random erasing on the device, of the boxes that `data_pipeline.transforms.erase` chooses."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from train.kernels.mixup import inside_boxes, tensor_to_device

# Shapes: N samples, H and W rows and columns.


def erase_inputs(inputs_NCHW: Tensor, boxes_N4: npt.NDArray[np.int64]) -> Tensor:
    """Set a box of each image to 0, which is the mean colour once the images are normalised.

    Args:
        inputs_NCHW: normalised float, any memory format, which is kept.
        boxes_N4: for these N; see `erase_boxes_at`.
    """
    device, (height, width) = inputs_NCHW.device, inputs_NCHW.shape[2:]
    inside_NHW = inside_boxes(tensor_to_device(boxes_N4, device), height, width)
    return torch.where(inside_NHW[:, None], 0.0, inputs_NCHW)
