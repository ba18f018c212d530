"""What `train.bench.train` measures: one network at a time, its passes, its step, and fed by the loader.

A subject runs in a process of its own and works when it is told to, so that the subjects can take turns and
each has a peak of memory of its own. The command line of this file is for that process only.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from itertools import repeat
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from data_pipeline.datasets.dataset import Dataset
from data_pipeline.datasets.open import open_dataset
from data_pipeline.loader import Loader, make_backend
from data_pipeline.loading.prefetch import Batch
from data_pipeline.transforms.augment import Augment
from train.bench.turns import answer_lines
from train.compile.choose import compile_step, fuse_lrn
from train.config.load import RunConfig, make_config
from train.distributed.world import World, cpu_share, open_world
from train.health.metrics import AccuracyMeter
from train.models.lrn import LocalResponseNorm
from train.setup import make_trainer
from train.step import TrainStep, to_device, train_step
from train.tune.steps import noise_batch, peak_memory_mb, wait_for

NUM_CLASSES = 1000
PREFETCH = 2
LEARNING_RATE = 1e-3


class StepSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One subject.

    Args:
        name: a network of ours, or `torchvision`: its `alexnet`, contiguous, with its reference script's SGD.
        batch: samples of a step.
        precision: number format of the forward pass.
        lrn: what normalises: ours, fused or eager; `torch` is nn.LocalResponseNorm, in float32; `none` leaves
            it out.
        compiled: whether Inductor compiles the network as a whole.
    """

    name: str
    batch: int
    precision: Literal["fp32", "bf16", "fp16"]
    lrn: Literal["fused", "eager", "torch", "none"] = "fused"
    compiled: bool = False


class Bench(msgspec.Struct, frozen=True, kw_only=True):
    """What all subjects share: the images' side, a folder of JPEGs, and the device."""

    crop_px: int
    folder: str
    device: Literal["cpu", "cuda"]


class TorchLRN(nn.LocalResponseNorm):
    """torch's own; it has no bfloat16 on the CPU, and half a range in float16."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise in float32."""
        return super().forward(input.float()).to(input.dtype)


def bench_config(spec: StepSpec, bench: Bench) -> RunConfig:
    """The configuration with which training would run a subject."""
    values = {
        "model.name": spec.name, "model.stem_stride": 4, "preprocessing.crop_px": bench.crop_px,
        "preprocessing.resize_px": bench.crop_px * 8 // 7, "global_batch": spec.batch,
        "precision": spec.precision, "device": bench.device, "optimizer.name": "sgd",
    }  # fmt: skip
    return make_config("tiny-imagenet", [f"{key}={value}" for key, value in values.items()])


def replace_lrn(network: nn.Module, lrn: str) -> None:
    """Put nothing, or torch's, in place of every LRN."""
    for parent in network.modules():
        for name, module in list(parent.named_children()):
            if isinstance(module, LocalResponseNorm):
                other = TorchLRN(module.size, module.alpha, module.beta, module.k)
                setattr(parent, name, nn.Identity() if lrn == "none" else other)


class OurSteps:
    """A network of ours, trained by the project's own engine."""

    def __init__(self, spec: StepSpec, bench: Bench, world: World) -> None:
        self.config, self.folder = bench_config(spec, bench), bench.folder
        self.device, self.batch, self.done = world.device, spec.batch, 0
        classes = tuple(f"class-{number}" for number in range(NUM_CLASSES))
        self.dataset = Dataset(Path(bench.folder), "train", (), np.zeros(0, np.int64), classes)
        self.trainer: TrainStep = make_trainer(self.config, self.dataset, world, None)
        if spec.lrn in ("none", "torch"):
            replace_lrn(self.trainer.network, spec.lrn)
        elif spec.lrn == "fused":
            fuse_lrn(self.trainer.network, bench.crop_px, self.trainer.precision, world)
        if spec.compiled:
            compile_step(self.trainer.network)
        self.sample = noise_batch(spec.batch, bench.crop_px, NUM_CLASSES)

    def forward(self) -> Tensor:
        """The loss of a batch, as in training."""
        images_NHWC, labels_N, _ = to_device(self.sample, self.device)
        inputs_NCHW = self.trainer.normalize(images_NHWC)
        with self.trainer.precision.autocast():
            logits_NC = self.trainer.parallel(inputs_NCHW)
        return cross_entropy(logits_NC.float(), labels_N)

    def zero(self) -> None:
        """Forget the gradients."""
        self.trainer.optimizer.zero_grad(set_to_none=True)

    def step(self) -> AccuracyMeter:
        """One step of the project's engine."""
        return self.train(self.sample)

    def train(self, batch: Batch) -> AccuracyMeter:
        """One step on a given batch."""
        self.done += 1
        return train_step(self.trainer, [batch], LEARNING_RATE, self.done)

    def fed(self, num_batches: int, *, train: bool) -> float:
        """Images per second of the loader alone, or of steps fed by it as training feeds them.

        As many batches as are read ahead go first, untimed: then the queue is as full as it will stay.
        """
        dataset = open_dataset(Path(self.folder), "train", quarantine=False)
        with ExitStack() as stack:
            backend = make_backend(
                "auto",
                device="gpu" if self.device.type == "cuda" else "cpu",
                preprocessing=self.config.preprocessing,
                max_batch=self.batch,
                num_threads=cpu_share(1),
            )
            stack.callback(backend.close)
            loader = Loader(backend, self.config.preprocessing, prefetch=PREFETCH)
            stream = loader.train(dataset, Augment(), seed=self.done, global_batch=self.batch)
            stack.callback(stream.close)
            counts, started = AccuracyMeter(self.device), 0.0
            for number, batch in zip(range(PREFETCH + 1 + num_batches), stream, strict=False):
                if train:
                    counts.merge(self.train(batch))
                if number == PREFETCH:
                    started = wait_for(self.device)
            return num_batches * self.batch / (wait_for(self.device) - started)


class TorchvisionSteps:
    """torchvision's `alexnet` as its reference script trains it: float32, contiguous, plain SGD.

    Source: pytorch/vision, references/classification/train.py (SGD, momentum 0.9, weight decay 1e-4).
    """

    def __init__(self, spec: StepSpec, bench: Bench, world: World) -> None:
        from torchvision.models import alexnet

        torch.manual_seed(0)
        self.device = world.device
        self.model: nn.Module = alexnet(num_classes=NUM_CLASSES).to(self.device)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), lr=LEARNING_RATE, momentum=0.9, weight_decay=1e-4
        )
        self.images_NCHW = torch.randn(spec.batch, 3, bench.crop_px, bench.crop_px, device=self.device)
        self.labels_N = torch.randint(NUM_CLASSES, (spec.batch,), device=self.device)

    def forward(self) -> Tensor:
        """The loss of a batch that is normalised already."""
        return cross_entropy(self.model(self.images_NCHW), self.labels_N)

    def zero(self) -> None:
        """Forget the gradients."""
        self.optimizer.zero_grad()

    def step(self) -> None:
        """One step of its script."""
        loss = self.forward()
        self.zero()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()


def time_passes(subject: OurSteps | TorchvisionSteps, count: int) -> dict[str, float]:
    """Seconds for a forward pass, a backward pass and a whole step, means of `count` of each."""
    seconds = {"forward": 0.0, "backward": 0.0, "step": 0.0}
    for _ in repeat(None, count):
        subject.zero()
        started = wait_for(subject.device)
        loss = subject.forward()
        between = wait_for(subject.device)
        torch.autograd.backward(loss)
        ended = wait_for(subject.device)
        seconds["forward"] += between - started
        seconds["backward"] += ended - between
    subject.zero()
    started = wait_for(subject.device)
    for _ in repeat(None, count):
        subject.step()
    seconds["step"] = wait_for(subject.device) - started
    return {name: total / count for name, total in seconds.items()}


def serve(spec: StepSpec, bench: Bench) -> None:
    """Answer `passes N`, `loader N`, `end_to_end N`, `memory` and `first` (seconds of the first step)."""

    def make() -> Callable[[list[str]], Any]:
        started = time.perf_counter()
        make_subject = TorchvisionSteps if spec.name == "torchvision" else OurSteps
        subject: OurSteps | TorchvisionSteps = make_subject(spec, bench, world)
        subject.step()
        first_s = wait_for(world.device) - started
        subject.step()

        def answer(words: list[str]) -> Any:
            if words[0] == "passes":
                return time_passes(subject, int(words[1]))
            if words[0] in ("loader", "end_to_end"):
                assert isinstance(subject, OurSteps)
                return subject.fed(int(words[1]), train=words[0] == "end_to_end")
            return first_s if words[0] == "first" else peak_memory_mb(world.device)

        return answer

    with open_world(bench.device) as world:
        if bench.device == "cpu":
            torch.set_num_threads(cpu_share(1))
        answer_lines(make)


if __name__ == "__main__":
    serve(msgspec.json.decode(sys.argv[1], type=StepSpec), msgspec.json.decode(sys.argv[2], type=Bench))
