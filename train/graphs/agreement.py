"""Tolerances between two steps for each number format, with their reasons.

Two steps that compute the same in another order differ by rounding. Little of that is a sum's own: where a
ReLU or a pooling chooses between numbers that are nearly equal, another choice moves a whole gradient, and
norms behind it spread that. How much depends on network and batch, so it is measured on both: in float32 by
the plain step with weights that are nudged by `NUDGE`, in a narrow format by the plain step in that format. A
fast step's tensor may be off `WORSE` times as much, or as much as the plain step's farthest tensor, and by
`EXACT` or `NARROW` in any case.

A tensor is compared in two ways: by its distance, the length of the difference relative to its own, and by
its share, how much of it is there. A wrong factor shows in the share, where other choices average out.

Measured on a CPU with 64 images of 32 pixels, convolutions by another algorithm in float32: distances up to
9e-4 (`owt`), 3.4e-3 (`bn`) and 0.033 (`bn_after_relu` on all layers), shares up to 2.7e-5, 2.8e-4 and 0.0048;
bfloat16 against float32: 0.09 and 0.28 (`owt`, `bn`), 0.0025 and 0.078.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Gap:
    """Relative difference between a tensor and its expected value.

    Attributes:
        distance: length of the difference.
        share: what is too much of the tensor, or too little; at most the distance.
    """

    distance: float
    share: float


NONE = Gap(0.0, 0.0)
EXACT = Gap(1e-2, 1e-3)
"""Always allowed in float32."""
NARROW = Gap(2e-2, 1e-2)
"""Always allowed in a narrow format: the plain step can be nearer by chance."""
WORSE = 2.0
"""So many times what rounding does to the plain step."""
NUDGE = 2.0**-17
"""Each weight is nudged by at most this share of it: several times what the order of a sum does."""
RESOLUTION = 2**-22
"""Two units in the last place of float32: a new weight less the old one is not known more exactly than this
share of the weight."""


def gap_between(found: Tensor, want: Tensor, slack: float = 0.0) -> Gap:
    """Compare two tensors of the same shape. Waits for the device.

    Args:
        slack: a length of the difference that does not count.
    Returns:
        A gap of infinity where `found` is not finite, or should be zeros and is not.
    """
    found, want = found.detach().float(), want.detach().to(found.device).float()
    difference = found - want
    length, far = (float(torch.linalg.vector_norm(tensor)) for tensor in (want, difference))
    if far <= slack:
        return NONE
    if not far < float("inf") or length == 0:
        return Gap(float("inf"), float("inf"))
    share = float(torch.dot(difference.reshape(-1), want.reshape(-1))) / length**2
    return Gap((far - slack) / length, max(0.0, abs(share) - slack / length))


def worst_of(gaps: Mapping[str, Gap], usual: Mapping[str, Gap], least: Gap) -> str | None:
    """Describe the farthest of a fast step's tensors that are too far off; None if none is.

    Args:
        gaps: by name, to the plain step in float32.
        usual: what rounding does to the plain step.
        least: always allowed.
    """
    farthest, far = max(gap.distance for gap in usual.values()), []
    share = WORSE * max(gap.share for gap in usual.values())
    for name, gap in gaps.items():
        is_far = gap.distance > max(least.distance, WORSE * usual[name].distance, farthest)
        has_factor = gap.share > max(least.share, share)
        if has_factor and gap.distance / 2 < gap.share < float("inf"):
            far.append((gap.share, f"{name} is too large or too small by {gap.share:.2g}"))
        elif is_far or has_factor:
            far.append((gap.distance, f"{name} is off by {gap.distance:.2g}"))
    if not far:
        return None
    return max(far)[1] + (f", and {len(far) - 1} more tensor(s) are" if len(far) > 1 else "")
