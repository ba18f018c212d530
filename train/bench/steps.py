"""The cases of `alexnet bench train`: steps on the device's images, ours fed by the loader, LRN alone."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Literal
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from data_pipeline.loading.batches import Batch
from train.bench import trainer
from train.bench.harness import time_calls
from train.bench.subjects import StepSpec
from train.bench.trainer import LEARNING_RATE, NUM_CLASSES, bench_config, noise_batch, wait_for
from train.compile.choose import compile_step, drop_toolkit_note, fuse_lrn
from train.distributed.numerics import exact_float32
from train.distributed.world import World, cpu_share, open_world
from train.health.metrics import AccuracyMeter
from train.models import alexnet
from train.models.lrn import LocalResponseNorm
from train.optim.precision import Precision

LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
LRN_CHANNELS = 96
"""Of the first LRN of `paper`."""
WARM_STEPS = {"cpu": 1, "cuda": 5}
"""Before the first round: what is captured in graphs takes three until it is as fast as it will be."""


class StepCase:
    """A network under measurement; subclasses define `step`."""

    first_step_s: float

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def step(self) -> object:
        """Train one step, from uint8 images on the device to updated weights."""
        raise NotImplementedError

    def step_s(self, count: int, untimed: int = 0) -> float:
        """Return seconds for a step, the mean of `count` after some that are not timed."""
        for _ in range(untimed):
            self.step()
        started = wait_for(self.device)
        for _ in range(count):
            self.step()
        return (wait_for(self.device) - started) / count

    def choice(self) -> dict[str, str | float]:
        """Return which step of the trainer runs, why, and the seconds of choosing; nothing for others."""
        return {}

    def start_and_memory(self) -> dict[str, float]:
        """Return seconds from nothing to the end of the first step, and the peak of memory so far."""
        return {"first_step_s": self.first_step_s, "peak_memory_mb": trainer.peak_memory_mb(self.device)}

    def profile(self) -> dict[str, float | None]:
        """Return what a step calls and launches; steps after this are slower."""
        return trainer.profile_step(self.step, self.device)


class OurSteps(StepCase):
    """A network of this project, trained as a run trains it."""

    def __init__(self, world: World, spec: StepSpec, crop_px: int, folder: Path) -> None:
        super().__init__(world.device)
        keys = (f"fused={spec.fused}", f"deterministic={json.dumps(spec.deterministic)}")
        config = bench_config(spec.network, spec.batch, crop_px, str(spec.precision), world.device.type, keys)
        self.crop_px, self.folder, self.batch, self.done = crop_px, folder, spec.batch, 0
        with patch.dict(vars(alexnet), STAND_INS[spec.norm]):
            parts = trainer.make_noise_parts(config, NUM_CLASSES, world)
        for name, layer in list(parts.network.features.named_children()):
            if isinstance(layer, nn.Identity):  # else fused kernels would not know what they see
                delattr(parts.network.features, name)
        fuse_lrn(parts.network, crop_px, parts.precision, world)
        if spec.compiled:
            compile_step(parts.network)
        sample = noise_batch(spec.batch, crop_px, NUM_CLASSES)
        self.sample = dataclasses.replace(sample, images=torch.from_numpy(sample.images).to(self.device))
        self.parts, started = parts, time.perf_counter()
        self.run, self.record = trainer.make_step(parts, self.sample)
        self.choice_s = time.perf_counter() - started  # with a proof, most of a cold start

    def choice(self) -> dict[str, str | float]:
        """Return which step runs, and why, as in a run's `step.json`, and the seconds of choosing it."""
        return {"step": self.record.chosen, "why": self.record.why, "choice_s": self.choice_s}

    def step(self, batch: Batch | None = None) -> AccuracyMeter:
        """Train one step, on a given batch or on noise."""
        self.done += 1
        return self.run([self.sample if batch is None else batch], LEARNING_RATE, self.done)

    def fed_s(self, num_batches: int) -> dict[str, float]:
        """Return seconds for a batch: of steps, of the loader, and of steps fed by it as in training."""
        # DALI, which the figures of the steps are without
        from train.bench.loaders import ENDLESS, PREFETCH, Subject, our_loader, time_batches

        counts, clock = AccuracyMeter(self.device), partial(wait_for, self.device)
        subject = Subject(
            "fed", our_loader, self.folder, cpu_share(1), self.batch, self.crop_px,
            gpu=self.device.type == "cuda", decoder="auto",
        )  # fmt: skip
        uses: dict[str, Callable[[Batch], object]] = {
            "loader": len,
            "end_to_end": lambda batch: counts.merge(self.step(batch)),
        }
        found = {"fed_step": self.step_s(num_batches)}
        for phase, use in uses.items():
            with ExitStack() as stack:
                batches = our_loader(subject, stack, use)(ENDLESS)  # read ahead to the end, as in training
                # As many batches as are read ahead go first: then the queue is as full as it will stay.
                rate, _ = time_batches(batches, num_batches, untimed=PREFETCH + 1, clock=clock)
                found[phase] = self.batch / rate
        return found


class TorchvisionSteps(StepCase):
    """torchvision's `alexnet`, as its reference script trains it or as PyTorch's guides advise.

    The script: float32 with torch's own settings, or `--amp`; contiguous; plain SGD. The guides: bfloat16,
    channels_last, the fused optimiser, Inductor. The step normalises the images, as ours does.

    Source: pytorch/vision, references/classification/train.py (SGD, momentum 0.9, weight decay 1e-4).
    """

    def __init__(self, spec: StepSpec, crop_px: int, device: torch.device) -> None:
        from torchvision.models import alexnet as make_alexnet

        super().__init__(device)
        torch.manual_seed(0)
        self.spec, self.precision = spec, Precision(spec.precision or "fp32", device.type, "asked for")
        self.layout = torch.channels_last if spec.tuned else torch.contiguous_format
        self.model: nn.Module = make_alexnet(num_classes=NUM_CLASSES).to(device, memory_format=self.layout)
        if spec.compiled:
            drop_toolkit_note()
            self.model.compile(mode=spec.compiled)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), lr=LEARNING_RATE, momentum=0.9, weight_decay=1e-4, fused=spec.tuned
        )
        self.scaler = self.precision.make_scaler()
        preprocessing = bench_config("owt", spec.batch, crop_px, "fp32", device.type).preprocessing
        self.normalize = alexnet.Normalize(preprocessing).to(device)
        sample = noise_batch(spec.batch, crop_px, NUM_CLASSES)
        self.images_NHWC = torch.from_numpy(sample.images).to(device)
        self.labels_N = torch.from_numpy(sample.labels).to(device)

    def step(self) -> None:
        """Train one step."""
        inputs_NCHW: Tensor = self.normalize(self.images_NHWC).contiguous(memory_format=self.layout)
        if self.spec.compiled == "reduce-overhead":
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        self.optimizer.zero_grad()
        with self.precision.autocast():
            loss = cross_entropy(self.model(inputs_NCHW), self.labels_N)
        torch.autograd.backward(self.scaler.scale(loss))
        self.scaler.step(self.optimizer)
        self.scaler.update()


def open_steps(
    stack: ExitStack, spec: StepSpec, crop_px: int, folder: Path, device: Literal["cpu", "cuda"]
) -> StepCase:
    """Build a case, and train its first steps: they compile, choose and capture."""
    if device == "cpu":
        torch.set_num_threads(cpu_share(1))
    os.environ["KINETO_LOG_LEVEL"] = "6"  # the profiler prints that there is no GPU, else
    started = time.perf_counter()
    case: StepCase
    if spec.network == "torchvision":
        torch.backends.cudnn.benchmark = True  # as its script has it; TensorFloat-32 stays as torch has it
        case = TorchvisionSteps(spec, crop_px, torch.device(device))
    else:
        world = stack.enter_context(open_world(device, deterministic=spec.deterministic))
        case = OurSteps(world, spec, crop_px, folder)
    case.step()
    case.first_step_s = wait_for(case.device) - started
    case.step_s(WARM_STEPS[device])
    torch.cuda.empty_cache()  # of what choosing took: a dozen cases share the GPU
    return case


class TorchLRN(nn.LocalResponseNorm):
    """torch's own LRN in float32: it has no bfloat16 on the CPU, and half a range in float16."""

    def __init__(self, k: float) -> None:
        super().__init__(5, 1e-4, 0.75, k)

    def forward(self, input: Tensor) -> Tensor:
        """Normalise in float32."""
        return super().forward(input.float()).to(input.dtype)


STAND_INS: dict[str, dict[str, type[nn.Module]]] = {
    "own": {},
    "torch": {"LocalResponseNorm": TorchLRN},
    "none": {"LocalResponseNorm": nn.Identity, "BatchNorm": nn.Identity},
}
"""Classes in the place of those of `train.models.alexnet`, while a network is built; no run has these."""


class LrnCase:
    """The first LRN of `paper`, in float32, both memory formats and three forms.

    Args:
        stack: restores torch's settings.
        batch: images.
        side: of their maps.
        device: `cpu` or `cuda`.
    """

    def __init__(self, stack: ExitStack, batch: int, side: int, device: Literal["cpu", "cuda"]) -> None:
        if device == "cpu":
            torch.set_num_threads(cpu_share(1))
        stack.enter_context(exact_float32())
        fused = LocalResponseNorm()
        fused.fused = True
        self.modules = {
            "torch": nn.LocalResponseNorm(5, 1e-4, 0.75, 2.0),
            "eager": LocalResponseNorm(),
            "fused": fused,
        }
        generator = torch.Generator(device=device).manual_seed(0)
        x = torch.randn(batch, LRN_CHANNELS, side, side, device=device, generator=generator)
        self.leaves = {
            layout: x.contiguous(memory_format=memory_format).requires_grad_()
            for layout, memory_format in LAYOUTS.items()
        }
        self.clock = partial(wait_for, x.device)
        self.measure()  # compiles

    def measure(self) -> dict[str, dict[str, float]]:
        """The shorter of two times, forward and backward, in seconds by memory format and form."""
        return {
            layout: {
                form: min(time_calls(partial(pass_both_ways, module, leaf), 2, self.clock))
                for form, module in self.modules.items()
            }
            for layout, leaf in self.leaves.items()
        }


def pass_both_ways(module: nn.Module, leaf: Tensor) -> None:
    """Run a module forward and backward."""
    leaf.grad = None
    torch.autograd.backward(module(leaf), leaf.detach())
