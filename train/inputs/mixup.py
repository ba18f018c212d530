"""MixUp, CutMix and ten crops on the device, as `data_pipeline.transforms.mix` plans the mixing."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax

# Shapes: N samples, V views, C classes, H and W rows and columns.


@dataclass(frozen=True, eq=False)
class MixInputs:
    """`MixParams` on the device, by the same names.

    Attributes:
        partners: (N) int64.
        weights: (N) float32.
        boxes: (N, 4) int64.
        label_weights: (N) float32.
    """

    partners: Tensor
    weights: Tensor
    boxes: Tensor
    label_weights: Tensor


def mix_inputs(inputs_NCHW: Tensor, plan: MixInputs) -> Tensor:
    """Mix each sample with its partner, as `tests.helpers.reference.mix_images` defines it.

    Normalisation is affine and the weights of a pixel add up to 1, so mixing and normalising commute.

    Args:
        inputs_NCHW: float, any memory format, which is kept.
        plan: for these N.
    """
    inside_NHW = inside_boxes(plan.boxes, *inputs_NCHW.shape[2:])
    shares = torch.where(inside_NHW, 0.0, plan.weights[:, None, None])[:, None]
    return torch.lerp(inputs_NCHW[plan.partners], inputs_NCHW, shares)


def inside_boxes(boxes_N4: Tensor, height: int, width: int) -> Tensor:
    """Return which pixels of images are inside of boxes.

    Args:
        boxes_N4: top, left, bottom, right.
    Returns:
        (N, height, width) bool.
    """
    y, x = (torch.arange(size, device=boxes_N4.device) for size in (height, width))
    rows = (y >= boxes_N4[:, 0, None]) & (y < boxes_N4[:, 2, None])
    columns = (x >= boxes_N4[:, 1, None]) & (x < boxes_N4[:, 3, None])
    return rows[:, :, None] & columns[:, None, :]


def mixed_losses(
    logits_NC: Tensor,
    labels_N: Tensor,
    plan: MixInputs | None,
    label_smoothing: float = 0.0,
    weights_C: Tensor | None = None,
) -> Tensor:
    """Compute each sample's cross-entropy with its label, or with both labels that it was mixed from.

    Args:
        logits_NC: float32.
        labels_N: int64.
        plan: None if nothing was mixed.
        label_smoothing: share of each label that is spread over all classes. Source: Szegedy et al. 2016,
            section 7.
        weights_C: of the classes, float32: each label's term, those of smoothing too, is multiplied by that
            of its class, as by `weight` of torch's cross_entropy.
    Returns:
        (N) float32.
    """
    losses = partial(cross_entropy, weight=weights_C, reduction="none", label_smoothing=label_smoothing)
    own_N: Tensor = losses(logits_NC, labels_N)
    if plan is None:
        return own_N
    other_N = losses(logits_NC, labels_N[plan.partners])
    return torch.lerp(other_N, own_N, plan.label_weights)


def average_views(logits: Tensor, num_views: int) -> Tensor:
    """Return the logarithm of the mean softmax over the views of each image; its softmax is that mean.

    Args:
        logits: (N * V, C), the views of an image one after another.
        num_views: V.
    Returns:
        (N, C).
    Source: Krizhevsky et al. 2012, section 4.1.
    """
    log_probabilities = log_softmax(logits.float(), dim=1).view(-1, num_views, logits.shape[1])
    return log_probabilities.logsumexp(dim=1) - float(np.log(num_views))
