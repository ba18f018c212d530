"""The cases of `alexnet bench train`: a network's passes, its step, and its step fed by the loader."""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path
from typing import Literal

import msgspec
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from data_pipeline.common.machine import usable_cores
from data_pipeline.datasets.open import open_dataset
from data_pipeline.decode.backend import make_backend
from data_pipeline.loader import Loader
from data_pipeline.loading.batches import Batch
from data_pipeline.loading.scan import with_table
from data_pipeline.transforms.augment import Augment
from train.bench.trainer import bench_config, make_noise_parts, noise_batch, peak_memory_mb, wait_for
from train.compile.choose import compile_step, fuse_lrn
from train.distributed.world import World, cpu_share, open_world
from train.health.metrics import AccuracyMeter
from train.models.lrn import LocalResponseNorm
from train.step import to_device, train_step

NUM_CLASSES = 1000
PREFETCH = 2
LEARNING_RATE = 1e-3


class StepSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One network and the way to train it.

    Attributes:
        name: a network of ours, or `torchvision`: its `alexnet`, contiguous, with its reference script's SGD.
        batch: samples of a step.
        lrn: what normalises: ours, fused or eager; `torch` is nn.LocalResponseNorm, in float32; `none` leaves
            it out.
        compiled: whether Inductor compiles the network as a whole.
    """

    name: str
    batch: int
    precision: Literal["fp32", "bf16", "fp16"]
    lrn: Literal["fused", "eager", "torch", "none"] = "fused"
    compiled: bool = False


class StepCase:
    """A network under measurement; subclasses set `optimizer`, and define `forward` and `step`."""

    optimizer: torch.optim.Optimizer
    first_step_s: float

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def forward(self) -> Tensor:
        """Return the loss of a batch."""
        raise NotImplementedError

    def step(self) -> object:
        """Train one step."""
        raise NotImplementedError

    def time_passes(self, count: int) -> dict[str, float]:
        """Return seconds for a forward pass, a backward pass and a whole step, means of `count` of each."""
        forward_s = backward_s = 0.0
        for _ in range(count):
            self.optimizer.zero_grad()
            started = wait_for(self.device)
            loss = self.forward()
            between = wait_for(self.device)
            torch.autograd.backward(loss)
            forward_s += between - started
            backward_s += wait_for(self.device) - between
        self.optimizer.zero_grad()
        started = wait_for(self.device)
        for _ in range(count):
            self.step()
        step_s = wait_for(self.device) - started
        return {"forward": forward_s / count, "backward": backward_s / count, "step": step_s / count}

    def first_step_and_memory(self) -> tuple[float, float]:
        """Return seconds from nothing to the end of the first step, and the peak of memory so far, in MB."""
        return self.first_step_s, peak_memory_mb(self.device)


class OurSteps(StepCase):
    """A network of this project, trained as a run trains it."""

    def __init__(self, world: World, spec: StepSpec, crop_px: int, folder: Path) -> None:
        super().__init__(world.device)
        config = bench_config(spec.name, spec.batch, crop_px, spec.precision, world.device.type)
        self.preprocessing, self.folder, self.batch, self.done = config.preprocessing, folder, spec.batch, 0
        self.parts = make_noise_parts(config, NUM_CLASSES, world)
        self.optimizer = self.parts.optimizer
        if spec.lrn in ("none", "torch"):
            replace_lrn(self.parts.network, spec.lrn)
        elif spec.lrn == "fused":
            fuse_lrn(self.parts.network, crop_px, self.parts.precision, world)
        if spec.compiled:
            compile_step(self.parts.network)
        self.sample = noise_batch(spec.batch, crop_px, NUM_CLASSES)

    def forward(self) -> Tensor:
        """Return the loss of a batch, as in training."""
        images_NHWC, labels_N, _ = to_device(self.sample, self.device)
        inputs_NCHW = self.parts.normalize(images_NHWC)
        with self.parts.precision.autocast():
            logits_NC = self.parts.parallel(inputs_NCHW)
        return cross_entropy(logits_NC.float(), labels_N)

    def step(self, batch: Batch | None = None) -> AccuracyMeter:
        """Train one step, on a given batch or on noise."""
        self.done += 1
        return train_step(self.parts, [self.sample if batch is None else batch], LEARNING_RATE, self.done)

    def fed_images_per_s(self, num_batches: int, train: bool) -> float:
        """Measure the loader alone, or steps fed by it as in training; return images per second.

        As many batches as are read ahead go first, untimed: then the queue is as full as it will stay.
        """
        dataset = with_table(open_dataset(self.folder, "train", quarantine=False), usable_cores())
        with ExitStack() as stack:
            backend = make_backend(
                "auto", device="gpu" if self.device.type == "cuda" else "cpu",
                preprocessing=self.preprocessing, max_batch=self.batch, num_threads=cpu_share(1),
            )  # fmt: skip
            stack.callback(backend.close)
            loader = Loader(backend, self.preprocessing, prefetch=PREFETCH)
            stream = loader.train(dataset, Augment(), seed=self.done, global_batch=self.batch)
            stack.callback(stream.close)
            counts, started = AccuracyMeter(self.device), 0.0
            for number, batch in zip(range(PREFETCH + 1 + num_batches), stream, strict=False):
                if train:
                    counts.merge(self.step(batch))
                if number == PREFETCH:
                    started = wait_for(self.device)
            return num_batches * self.batch / (wait_for(self.device) - started)


class TorchvisionSteps(StepCase):
    """torchvision's `alexnet` as its reference script trains it: float32, contiguous, plain SGD.

    Source: pytorch/vision, references/classification/train.py (SGD, momentum 0.9, weight decay 1e-4).
    """

    def __init__(self, world: World, spec: StepSpec, crop_px: int, folder: Path) -> None:
        from torchvision.models import alexnet

        super().__init__(world.device)
        torch.manual_seed(0)
        self.model: nn.Module = alexnet(num_classes=NUM_CLASSES).to(self.device)
        parameters = self.model.parameters()
        self.optimizer = torch.optim.SGD(parameters, lr=LEARNING_RATE, momentum=0.9, weight_decay=1e-4)
        self.images_NCHW = torch.randn(spec.batch, 3, crop_px, crop_px, device=self.device)
        self.labels_N = torch.randint(NUM_CLASSES, (spec.batch,), device=self.device)

    def forward(self) -> Tensor:
        """Return the loss of a batch that is normalised already."""
        return cross_entropy(self.model(self.images_NCHW), self.labels_N)

    def step(self) -> None:
        """Train one step as the script does."""
        loss = self.forward()
        self.optimizer.zero_grad()
        torch.autograd.backward(loss)
        self.optimizer.step()


def open_steps(
    stack: ExitStack, spec: StepSpec, crop_px: int, folder: Path, device: Literal["cpu", "cuda"]
) -> StepCase:
    """Build a case, and train two steps: the first compiles what is compiled."""
    world = stack.enter_context(open_world(device))
    if device == "cpu":
        torch.set_num_threads(cpu_share(1))
    started = time.perf_counter()
    make = TorchvisionSteps if spec.name == "torchvision" else OurSteps
    case = make(world, spec, crop_px, folder)
    case.step()
    case.first_step_s = wait_for(world.device) - started
    case.step()
    return case


class TorchLRN(nn.LocalResponseNorm):
    """torch's own LRN in float32: it has no bfloat16 on the CPU, and half a range in float16."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise in float32."""
        return super().forward(input.float()).to(input.dtype)


def replace_lrn(network: nn.Module, lrn: Literal["none", "torch"]) -> None:
    """Replace every LRN by nothing, or by torch's."""
    for parent in network.modules():
        for name, module in list(parent.named_children()):
            if isinstance(module, LocalResponseNorm):
                other = TorchLRN(module.size, module.alpha, module.beta, module.k)
                setattr(parent, name, nn.Identity() if lrn == "none" else other)
