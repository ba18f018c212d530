"""The tables of a run's configuration: data, model, optimiser, schedule; `load.py` has the whole."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

Positive = Annotated[int, msgspec.Meta(ge=1)]
Count = Annotated[int, msgspec.Meta(ge=0)]
AboveZero = Annotated[float, msgspec.Meta(gt=0)]
NotNegative = Annotated[float, msgspec.Meta(ge=0)]
Fraction = Annotated[float, msgspec.Meta(ge=0, le=1)]
BelowOne = Annotated[float, msgspec.Meta(ge=0, lt=1)]
Init = Literal["he", "paper", "caffe", "torch"]


class Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of all configuration values: immutable, and closed to unknown keys."""


class DataConfig(Table, frozen=True):
    """Where the images are and who decodes them.

    Args:
        root: folder with `train/` and `val/`; `data/demo-digits` is written when it is not there.
        backend: `dali`, `pillow`, or `auto` (DALI where it is installed).
        threads: decoding threads a rank; 0 shares the processor cores among the ranks of a machine.
        readers: processes a rank that read files ahead; 0 for threads of the rank's own. None: processes
            where a GPU decodes, since it is faster than threads read, and threads on a CPU, which is not.
        prefetch: batches decoded ahead.
    """

    root: str | None = None
    backend: Literal["auto", "dali", "pillow"] = "auto"
    threads: Annotated[int, msgspec.Meta(ge=0, le=256)] = 0
    readers: Annotated[int, msgspec.Meta(ge=0, le=64)] | None = None
    prefetch: Annotated[int, msgspec.Meta(ge=1, le=64)] = 2


class ModelConfig(Table, frozen=True):
    """Which network, see `train.models.alexnet`.

    Args:
        stem_stride: the first convolution's: 4 for 224 pixels.
        hidden_units: of each of the two fully connected layers before the last one; 4096 as published, fewer
            for small data.
    """

    name: Literal["paper", "caffe", "owt", "bn"] = "paper"
    stem_stride: Annotated[int, msgspec.Meta(ge=1, le=4)] = 4
    hidden_units: Annotated[int, msgspec.Meta(ge=1, le=65536)] = 4096
    dropout: BelowOne = 0.5
    init: Init = "he"


class OptimizerConfig(Table, frozen=True):
    """SGD with momentum, and what is done to it, see `train.optim.sgd`.

    Args:
        name: `sgd`, or `lars`, which gives each layer a rate of its own.
        momentum: share of the velocity that a step keeps.
        momentum_form: where the rate goes. `torch` applies it to the velocity, so that a drop of the rate
            acts at once; `paper` applies it to what enters the velocity, as Krizhevsky and Caffe did, so that
            after a drop the velocity still carries steps of the old rate.
        weight_decay: L2 penalty's factor.
        nesterov: look ahead along the velocity.
        decay_bias_and_norm: biases and norms decay, too.
        bias_and_norm_rate: their rate, as a multiple of the others'.
        trust_coefficient: LARS's ratio of a step of rate 1 to the layer's weights.
    """

    name: Literal["sgd", "lars"] = "sgd"
    momentum: BelowOne = 0.9
    momentum_form: Literal["torch", "paper"] = "torch"
    weight_decay: NotNegative = 5e-4
    nesterov: bool = False
    decay_bias_and_norm: bool = False
    bias_and_norm_rate: AboveZero = 1.0
    trust_coefficient: AboveZero = 0.001

    def __post_init__(self) -> None:
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov needs a momentum above 0")


class ScheduleConfig(Table, frozen=True):
    """The learning rate over the run, see `train.optim.schedule.lr_at`. Times are in epochs.

    Args:
        learning_rate: the rate after the warm-up, for batches of `reference_batch` samples.
        scaling: how the rate grows with `global_batch / reference_batch`: not at all, or by that factor
            (`linear`), or by its square root (`sqrt`).
        reference_batch: samples a step that `learning_rate` is meant for; needed by `linear` and `sqrt`.
        kind: `step` multiplies by `factor` at each of `milestones`; `plateau` does when the validation error
            has not fallen for `patience` epochs, `max_drops` times at most; `poly` falls to 0 as
            (1 - t)^`power`, `cosine` as half a wave; `constant` stays.
        warmup_epochs: epochs of linear warm-up.
        warmup_start: where it begins, as a fraction of the rate.
        milestones: ascending epochs at which `step` lowers the rate.
        factor: what it is multiplied by, 0..1.
        patience: epochs without a better validation top-1 before `plateau` lowers the rate.
        min_improvement: a better top-1 is one that is higher by at least this, in 0..1.
        max_drops: how often `plateau` lowers the rate.
        power: of `poly`.
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
