"""Random erasing on the device, of the boxes that `data_pipeline.transforms.erase` chooses."""

from __future__ import annotations

import torch
from torch import Tensor

from train.inputs.mixup import inside_boxes

# Shapes: N samples, H and W rows and columns.


def erase_inputs(inputs_NCHW: Tensor, boxes_N4: Tensor) -> Tensor:
    """Set a box of each image to 0, which is the mean colour once the images are normalised.

    Args:
        inputs_NCHW: normalised float, any memory format, which is kept.
        boxes_N4: for these N, int64, on their device; see `erase_boxes_at`.
    """
    inside_NHW = inside_boxes(boxes_N4, *inputs_NCHW.shape[2:])
    return torch.where(inside_NHW[:, None], 0.0, inputs_NCHW)
