"""The learning rate over a run, as it is configured."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from train.config.values import AboveZero, Fraction, NotNegative, Positive, Table


class ScheduleConfig(Table, frozen=True):
    """The learning rate over the run, see `train.optim.schedule.lr_at`. Times are in epochs.

    Attributes:
        learning_rate: the rate after the warm-up, for batches of `reference_batch` samples.
        scaling: how the rate grows with `global_batch / reference_batch`: not at all, or by that factor
            (`linear`), or by its square root (`sqrt`).
        reference_batch: samples a step that `learning_rate` is meant for; needed by `linear` and `sqrt`.
        kind: `step` multiplies by `factor` at each of `milestones`; `plateau` does when the validation error
            has not fallen for `patience` epochs, `max_drops` times at most; `poly` falls to 0 as
            (1 - t)^`power`, `cosine` as half a wave; `constant` stays.
        warmup_epochs: epochs of linear warm-up.
        warmup_start: rate at the start of the warm-up, as a fraction of `learning_rate`.
        milestones: ascending epochs at which `step` lowers the rate.
        factor: multiplier of each drop, 0..1.
        patience: epochs without a better validation top-1 before `plateau` lowers the rate.
        min_improvement: a better top-1 is one that is higher by at least this, in 0..1.
        max_drops: how often `plateau` lowers the rate.
        power: exponent of `poly`.
    """

    learning_rate: AboveZero = 0.01
    scaling: Literal["none", "linear", "sqrt"] = "none"
    reference_batch: Positive | None = None
    kind: Literal["step", "plateau", "poly", "cosine", "constant"] = "step"
    warmup_epochs: NotNegative = 0.0
    warmup_start: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.01
    milestones: tuple[float, ...] = ()
    factor: Fraction = 0.1
    patience: Positive = 5
    min_improvement: Fraction = 0.001
    max_drops: Positive = 3
    power: AboveZero = 2.0

    def __post_init__(self) -> None:
        if any(b <= a for a, b in zip((0.0, *self.milestones), self.milestones, strict=False)):
            raise ValueError(f"milestones must be epochs above 0 in ascending order, not {self.milestones}")
        if self.scaling != "none" and self.reference_batch is None:
            raise ValueError(f"scaling {self.scaling} needs reference_batch, which learning_rate is for")
        if self.kind == "plateau" and self.factor == 0:
            raise ValueError("plateau needs a factor above 0")
