"""The run configuration: a tree of frozen values, range-checked when it is built.

`load.py` fills it from recipes and `--set`. It holds nothing that can be derived from another value (steps
per epoch, rank batch).
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

import msgspec

from data_pipeline.remote.cache import DEFAULT_GB
from data_pipeline.transforms.augment import Augment
from data_pipeline.transforms.preprocessing import Preprocessing
from train.config.schedule import ScheduleConfig
from train.config.values import AboveOne, AboveZero, BelowOne, Count, Fraction, NotNegative, Positive, Table

Device = Literal["auto", "cpu", "cuda"]
Init = Literal["he", "paper", "caffe", "torch"]
Norm = Literal["lrn", "bn", "bn_after_relu", "none"]
Groups = Literal[1, 2]
ClassWeights = Literal["none", "balanced"] | tuple[Annotated[float, msgspec.Meta(gt=0, lt=1e9)], ...]

FREE_TO_CHANGE = (
    "data", "device", "cpu_threads", "micro_batch", "timeout_s", "log_every", "checkpoint_every",
    "keep_checkpoints", "keep_every", "max_skipped", "flat_loss_grace", "log_noise_scale", "parallel",
    "stop_patience", "max_hours", "fused",
)  # fmt: skip
"""Keys of `RunConfig` that a resumed run may change: they decide where it computes and for
how long, not what."""
DECIDE_THE_SCHEDULE = ("epochs", "global_batch", "schedule")
"""Keys that it may change with `--allow-changed-schedule`: they decide the learning rates and batches of
later steps (`train.runs.changes`). All others decide the result as a whole."""


class DataConfig(Table, frozen=True):
    """Location of the images, and their decoder.

    Attributes:
        root: folder with `train/` and `val/`, or the address of shards. `data/demo-digits` is written when it
            is missing.
        quarantine: the list of files to leave out, from `alexnet data verify --list`; by itself it is
            `quarantine.jsonl` in `root`, or the one that is kept in the user's cache.
        backend: `dali`, `pillow`, or `auto` (DALI where it is installed).
        threads: decoding threads a rank; 0 shares the processor cores among the ranks of a machine.
        prefetch: batches held ready; as many more, and three, are being decoded.
        cache: keeps the decoded pixels of splits whose images have one size, so that each is decoded once:
            `ram`, one copy a machine in shared memory; `gpu`, one on each GPU; `auto`, on the GPU, else in
            memory, where a quarter of what is free holds them and they are read twice or more; `none`.
        deterministic: a GPU decodes a file to the same bytes each time, without its hardware decoder. On a
            CPU it always does. The run's own `deterministic` implies it.
        remote_cache_gb: most gigabytes that shards of s3://, gs:// and https:// addresses take in the user's
            cache, those of other runs included.
        balance: 0..1; an epoch keeps its length, and a class of n images has n^(1 - balance) of it, in
            proportion: at 0 each image comes once, at 1 every class equally often
            (`data_pipeline.transforms.sampler.order_at`).
        max_decoded_gb: bound on the decoded images, not cropped yet, that a GPU holds. What exceeds it is cut
            on the CPU.
    """

    root: str | None = None
    quarantine: str | None = None
    backend: Literal["auto", "dali", "pillow"] = "auto"
    threads: Annotated[int, msgspec.Meta(ge=0, le=256)] = 0
    prefetch: Annotated[int, msgspec.Meta(ge=1, le=64)] = 2
    cache: Literal["none", "ram", "gpu", "auto"] = "auto"
    balance: Fraction = 0.0
    deterministic: bool = False
    remote_cache_gb: AboveZero = DEFAULT_GB
    max_decoded_gb: Annotated[float, msgspec.Meta(ge=0.1, le=1000)] = 2.0


class ModelConfig(Table, frozen=True):
    """The network to build, see `train.models.alexnet`. Keys that are None are as published for its name.

    Attributes:
        stem_kernel: side of the first kernel, odd; padded by half of it, or as published where it is 11.
        stem_stride: stride of the first convolution: 4 for 224 pixels.
        groups: of the 2nd, 4th and 5th convolution.
        norm: `lrn` behind the first two ReLUs; batch normalisation of all five convolutions, before
            (`bn`; they then have no bias) or behind (`bn_after_relu`) the ReLU; or `none`.
        hidden_norm: batch normalisation of the two hidden fully connected layers too, on the side of `norm`.
        norm_batch: consecutive samples of the global batch whose statistics batch normalisation takes (ghost
            batches), whatever ranks and micro-batches; None for all samples of a pass, on all ranks.
        pool_padding: pixels around the map of each of the three poolings.
        hidden_units: of each of the two hidden layers; 4096 as published, fewer for small data.
    """

    name: Literal["paper", "caffe", "owt", "bn"] = "paper"
    stem_kernel: Annotated[int, msgspec.Meta(ge=3, le=11)] | None = None
    stem_stride: Annotated[int, msgspec.Meta(ge=1, le=4)] = 4
    groups: Groups | None = None
    norm: Norm | None = None
    hidden_norm: bool = False
    norm_batch: Annotated[int, msgspec.Meta(ge=2)] | None = None
    pool_padding: Literal[0, 1] = 0
    hidden_units: Annotated[int, msgspec.Meta(ge=1, le=65536)] = 4096
    dropout: BelowOne = 0.5
    init: Init = "he"

    def __post_init__(self) -> None:
        if self.stem_kernel is not None and self.stem_kernel % 2 == 0:
            raise ValueError(f"stem_kernel must be odd, not {self.stem_kernel}")
        if self.name == "owt" and self.norm not in (None, "none"):
            raise ValueError(
                f"`owt` is torchvision's network, key for key, which has no norms: norm={self.norm} goes "
                "with name=paper and groups=1"
            )
        if self.hidden_norm and not self.has_batch_norm:
            raise ValueError("hidden_norm needs batch normalisation: set norm to bn or bn_after_relu")
        if self.norm_batch is not None and not self.has_batch_norm:
            raise ValueError("norm_batch is for batch normalisation: set norm to bn or bn_after_relu")

    @property
    def has_batch_norm(self) -> bool:
        """Whether the convolutions have batch normalisation."""
        return self.norm in ("bn", "bn_after_relu") or (self.norm is None and self.name == "bn")

    @property
    def description(self) -> str:
        """The name, and the keys that change its layers.

        >>> ModelConfig(groups=1, norm="bn_after_relu", hidden_norm=True).description
        'paper (groups=1, norm=bn_after_relu, hidden_norm)'
        """
        keys = {"stem_kernel": self.stem_kernel, "groups": self.groups, "norm": self.norm}
        changes = [f"{key}={value}" for key, value in keys.items() if value is not None]
        changes += ["hidden_norm"] * self.hidden_norm + ["pool_padding=1"] * self.pool_padding
        return f"{self.name} ({', '.join(changes)})" if changes else self.name


class OptimizerConfig(Table, frozen=True):
    """SGD with momentum and its variants, see `train.optim.sgd`.

    Attributes:
        name: `sgd`, or `lars`, which gives each layer a rate of its own.
        momentum: share of the velocity that a step keeps.
        momentum_form: where the learning rate enters. `torch` applies it to the velocity, so that a drop of
            the rate acts at once; `paper` applies it to what enters the velocity, as Krizhevsky and Caffe
            did, so that after a drop the velocity still carries steps of the old rate.
        weight_decay: factor of the L2 penalty.
        nesterov: look ahead along the velocity.
        decay_bias_and_norm: whether biases and norms decay as well.
        bias_and_norm_rate: learning rate of biases and norms, as a multiple of the others'.
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


class RunConfig(Table, frozen=True):
    """Everything that decides a run's result.

    Attributes:
        recipe: the recipe's name, for the run folder and the records.
        seed: of the data order, the augmentations, the initial weights and the dropout masks.
        epochs: passes over the training split.
        global_batch: samples an optimiser step uses, over all ranks and accumulation steps.
        micro_batch: most samples that one rank takes through the network at once; None for no limit.
            Accumulation follows from it.
        precision: `auto` is bfloat16 where the hardware has it, else float16 on a GPU and float32 on a CPU.
        device: `auto` is CUDA where there is a GPU.
        cpu_threads: compute threads a rank on a CPU; 0 shares the cores among the ranks of a machine.
        timeout_s: a rank that keeps the others waiting in a collective for longer ends the run.
        parallel: `ddp` gives every rank the whole network; `hybrid` splits the fully connected layers over
            the ranks, so that fewer bytes travel (`train.distributed.hybrid`).
        compress: `bf16` rounds gradients to bfloat16 while they travel under plain ddp.
        lrn: `fused` compiles local response normalisation, `eager` does not; `auto` does in runs long enough.
        compile: compile the network's passes as a whole where that is measured to be faster, at the start.
        deterministic: two runs on one GPU, or one that was resumed, end with the same bits: nothing is chosen
            by time, and only kernels that repeat their bits run. On a CPU they end so anyway.
        fused: `auto` trains with a fast step where one is proved right and faster on the card
            (`train.graphs`); `off` with the plain one.
        log_every: optimiser steps between training rows.
        log_noise_scale: training rows have the gradient noise scale as well, see `train.health.noise_scale`;
            needs a batch in parts, of several ranks or of `micro_batch`.
        checkpoint_every: optimiser steps between checkpoints inside an epoch; None saves at its end only.
        max_skipped: so many steps skipped in a row, because their gradient was not finite, end the run.
        spike_factor: skip a step, too, whose gradient's norm is more than so many times its running mean;
            None for no such check.
        flat_loss_grace: a training loss that stays at ln(classes) for so many steps ends the run, see
            `train.health.flat_loss`; 0 turns that off.
        label_smoothing: share of a label that is spread over all classes, 0..1; the training loss has it in.
        class_weights: of the classes in the training loss: `none`; `balanced`, the same sum for every class;
            or one above 0 for each class, in the order of their names. They are scaled to a mean of 1 over
            the samples of an epoch (`train.optim.class_weights`).
        ema_decay: keep a moving average of the weights, which is evaluated and exported in place of the last
            ones (`train.optim.ema`); 0 keeps none.
        init_from: weights to begin with, in place of those that the seed makes: a checkpoint or a run of
            ours, a file of weights, or `torchvision` (`train.pretrained`). Read at step 0 only.
        freeze: `features` keeps the convolutions and their norms as `init_from` has them.
        head_rate: learning rate of the last layer, as a multiple of the others'.
        stop_patience: so many epochs in a row without a better validation top-1 end the run; 0 is off.
        max_hours: training for so long, resumed runs included, ends the run; 0 for no limit.
        ten_crop: evaluate each validation image by the mean of ten views, as the paper, not by the centre.
        keep_checkpoints: how many of the newest checkpoints stay; the best one always does.
        keep_every: the first checkpoint at or after each multiple of so many steps stays as well.
    """

    recipe: str = "custom"
    seed: Annotated[int, msgspec.Meta(ge=0, le=2**62)] = 0
    epochs: Positive = 90
    global_batch: Positive = 128
    micro_batch: Positive | None = None
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    device: Device = "auto"
    cpu_threads: Annotated[int, msgspec.Meta(ge=0, le=1024)] = 0
    timeout_s: Annotated[float, msgspec.Meta(ge=1, le=86400)] = 600.0
    parallel: Literal["ddp", "hybrid"] = "ddp"
    compress: Literal["none", "bf16"] = "none"
    lrn: Literal["auto", "fused", "eager"] = "auto"
    compile: bool = False
    deterministic: bool = False
    fused: Literal["auto", "off"] = "auto"
    log_every: Positive = 20
    log_noise_scale: bool = False
    checkpoint_every: Positive | None = None
    keep_checkpoints: Positive = 2
    keep_every: Positive | None = None
    max_skipped: Positive = 10
    spike_factor: AboveOne | None = None
    flat_loss_grace: Count = 10_000
    label_smoothing: BelowOne = 0.0
    class_weights: ClassWeights = "none"
    ema_decay: BelowOne = 0.0
    stop_patience: Count = 0
    max_hours: NotNegative = 0.0
    ten_crop: bool = False
    init_from: Annotated[str, msgspec.Meta(min_length=1)] | None = None
    freeze: Literal["none", "features"] = "none"
    head_rate: AboveZero = 1.0
    data: DataConfig = DataConfig()
    preprocessing: Preprocessing = Preprocessing()
    augment: Augment = Augment()
    model: ModelConfig = ModelConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[^/\0.][^/\0]{0,99}", self.recipe):
            raise ValueError(
                f"recipe {self.recipe[:100]!r} names a run's folder: 1 to 100 characters, no / and no . first"
            )
        if self.freeze == "features" and self.init_from is None:
            raise ValueError(
                "freeze=features keeps the features as init_from has them, and there is no init_from: name "
                "weights with --init, or use freeze=none"
            )
        if self.parallel != "hybrid":
            return
        if self.freeze != "none":
            raise ValueError(
                "parallel=hybrid reduces the gradients of the features, and freeze=features leaves none: use "
                "parallel=ddp"
            )
        if self.compress != "none":
            raise ValueError(
                f"compress={self.compress} is for plain ddp: parallel=hybrid sends no gradients of the large "
                "layers; choose one"
            )
        if self.compile:
            raise ValueError(
                "compile=true compiles the network as a whole, and parallel=hybrid splits it: choose one"
            )
        if self.model.hidden_norm:
            raise ValueError(
                "hidden_norm normalises hidden layers as a whole, and parallel=hybrid splits them: use "
                "parallel=ddp"
            )
        if self.optimizer.name == "lars":
            raise ValueError(
                "lars needs the norm of each whole layer, of which parallel=hybrid leaves a rank a part; and "
                "with batches as large as lars is for, ddp sends less (docs/scaling.md): use parallel=ddp"
            )
        if self.log_noise_scale:
            raise ValueError(
                "log_noise_scale compares each rank's own gradients, and under parallel=hybrid no rank has "
                "one of the fully connected layers: use parallel=ddp"
            )
