"""The gradient noise scale in a run's rows: each row's estimate, and the running sums that they add up to."""

from __future__ import annotations

import math
from collections.abc import Iterable

from train.health.noise_scale import NoiseEstimate, smooth_noise
from train.runs.folder import MetricsRow


class NoiseRows:
    """Turns estimates into row fields; its sums follow from the rows alone, so a resumed run has them.

    Args:
        rows: those that the run has so far.
    """

    def __init__(self, rows: Iterable[MetricsRow]) -> None:
        self.sums: NoiseEstimate | None = None
        before = 0
        for row in rows:
            if row.split != "train":
                continue
            if isinstance(row.grad_square, float) and isinstance(row.grad_trace, float):
                steps = row.step - before - row.skipped
                self._add(NoiseEstimate(square=row.grad_square, trace=row.grad_trace, num_steps=steps))
            before = row.step

    def fields(self, new: NoiseEstimate | None) -> dict[str, float | None]:
        """A row's fields for the steps since the last one; None where there is nothing to say."""
        if new is None or not (math.isfinite(new.square) and math.isfinite(new.trace)):
            return dict.fromkeys(("grad_square", "grad_trace", "noise_scale"))
        return {
            "grad_square": new.square, "grad_trace": new.trace, "noise_scale": self._add(new).scale
        }  # fmt: skip

    def _add(self, new: NoiseEstimate) -> NoiseEstimate:
        self.sums = smooth_noise(self.sums, new)
        return self.sums
