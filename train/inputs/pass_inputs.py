"""The inputs of a step, as tensors on the device: nothing behind this looks at arrays.

Shapes: N samples of a micro-batch, H and W rows and columns, K numbers of an operation, 4 edges of a box.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
import torch.utils.dlpack
from torch import Tensor

from data_pipeline.loading.batches import Batch
from data_pipeline.loading.cache import CachedCrops
from train.inputs.borrowed import lender_of
from train.inputs.cached_crops import crop_cached
from train.inputs.mixup import MixInputs
from train.inputs.packed import Arrays, place, tensor_to_device
from train.inputs.trivial import pack_trivial


@dataclass(frozen=True, eq=False)
class PassInputs:
    """One micro-batch on the device. None where the configuration has no such augmentation.

    Attributes:
        images: (N, crop, crop, 3) uint8 RGB.
        labels: (N) int64.
        valid: (N) bool, False for a sample that could not be read.
        rows: (N) int32, positions in the epoch's order, of which dropout's masks are a function.
        trivial: (K, N) float64, TrivialAugment's numbers, see `pack_trivial`.
        erase: (N, 4) int64, boxes to erase.
        mix: how images and labels are mixed.
    """

    images: Tensor
    labels: Tensor
    valid: Tensor
    rows: Tensor
    trivial: Tensor | None = None
    erase: Tensor | None = None
    mix: MixInputs | None = None


def arrays_of(batch: Batch, side: int) -> Arrays:
    """Return all of a batch but its images, by the names that `inputs_of` reads.

    Args:
        side: of the images, in pixels.
    """
    arrays: Arrays = {
        "labels": batch.labels,
        "valid": batch.valid,
        "rows": batch.positions.astype(np.int32),
    }
    if batch.trivial is not None:
        arrays["trivial"] = pack_trivial(batch.trivial, side)
    if batch.erase is not None:
        arrays["erase"] = batch.erase
    if batch.mix is not None:
        arrays |= vars(batch.mix)
    return arrays


def inputs_of(images_NHWC: Tensor, tensors: dict[str, Tensor]) -> PassInputs:
    """Put a pass's inputs together.

    Args:
        tensors: the arrays of `arrays_of`, on the device of the images.
    """
    own = dict(tensors)
    mix = {field.name: own.pop(field.name) for field in fields(MixInputs) if field.name in own}
    return PassInputs(images_NHWC, **own, mix=MixInputs(**mix) if mix else None)


def make_inputs(batch: Batch, device: torch.device) -> PassInputs:
    """Move a micro-batch to a device, in two copies, without waiting for them."""
    images_NHWC = images_on_device(batch.images, device)
    return inputs_of(images_NHWC, place(arrays_of(batch, images_NHWC.shape[1]), device))


def to_device(batch: Batch, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return a batch's images, labels and validity on a device, without waiting for the copies.

    Returns:
        uint8 (N, H, W, 3) or, for V views of each image, (N, V, H, W, 3); int64 (N,), bool (N,).
    """
    labels_N, valid_N = tensor_to_device(batch.labels, device), tensor_to_device(batch.valid, device)
    return images_on_device(batch.images, device), labels_N, valid_N


def images_on_device(images: Any, device: torch.device) -> Tensor:
    """Return the images of a batch on a device: cropped there, taken over from the decoder, or copied."""
    if isinstance(images, CachedCrops):
        return crop_cached(images.pixels, images.indices, images.crops)
    tensor = torch.utils.dlpack.from_dlpack(images)
    if tensor.is_cuda and tensor.device == device:
        return lender_of(device).take_over(tensor)
    return tensor_to_device(tensor, device)
