"""Training on noise, for the benches; what `alexnet bench train` measures: steps, matrix products, LRN."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from timeit import repeat, timeit
from typing import Any, Literal
from unittest.mock import patch

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from data_pipeline.loading.batches import Batch
from train.bench.subjects import StepSpec
from train.compile.choose import compile_step, drop_toolkit_note, fuse_lrn
from train.config.load import make_config
from train.config.schema import RunConfig
from train.distributed.measure import peak_memory_mb, wait_for
from train.distributed.numerics import exact_float32
from train.distributed.world import World, cpu_share, open_world
from train.graphs.choose import WORTH_IMAGES, Course, open_step
from train.graphs.verdict import FILE, read_record
from train.health.metrics import AccuracyMeter
from train.models import alexnet
from train.models.lrn import LocalResponseNorm
from train.optim.precision import TYPES, Precision
from train.setup import make_noise_parts, noise_batch
from train.step import train_step

Device = Literal["cpu", "cuda"]
Parts = Mapping[str, tuple[float, Callable[[], object]]]  # by figure: how much of it, and what does that
NUM_CLASSES, LEARNING_RATE = 1000, 1e-3
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
LAUNCH = re.compile(r"cu(da)?(LaunchKernel|GraphLaunch|Mem(cpy|set))")  # calls that put work on a GPU
STAND_INS: dict[str, dict[str, Callable[..., nn.Module]]] = {
    "own": {},
    "torch": {"LocalResponseNorm": partial(nn.LocalResponseNorm, 5)},
    "none": {"LocalResponseNorm": nn.Identity, "BatchNorm": nn.Identity},
}  # in the place of classes of `train.models.alexnet`, while a network is built; no run has these


def bench_config(
    variant: str, global_batch: int, crop_px: int, precision: str, device: str, overrides: Sequence[str] = ()
) -> RunConfig:
    """Return the configuration that trains a network on images of `crop_px` pixels."""
    values = {
        "model.name": variant, "model.stem_stride": 4, "preprocessing.crop_px": crop_px,
        "preprocessing.resize_px": crop_px * 8 // 7, "global_batch": global_batch, "precision": precision,
        "device": device, "optimizer.name": "sgd",
    }  # fmt: skip
    return make_config("tiny-imagenet", [*(f"{key}={value}" for key, value in values.items()), *overrides])


@cache
def gflop_of(network: str, crop_px: int) -> float:
    """Count 1e9 operations of convolutions and linear layers for an image, forward and backward."""
    from torch.utils.flop_counter import FlopCounterMode  # and Triton: 90 MB where memory is measured
    from torchvision.models import alexnet as torchvision_alexnet

    with torch.device("meta"):
        model: Any = torchvision_alexnet(num_classes=NUM_CLASSES)
        if network != "torchvision":
            config = bench_config(network, 1, crop_px, "fp32", "cpu").model
            model = alexnet.make_model(config, num_classes=NUM_CLASSES, crop_px=crop_px)
        with FlopCounterMode(display=False) as forward:
            model(image := torch.empty(1, 3, crop_px, crop_px))
        with FlopCounterMode(display=False) as first:
            model.features[0](image)
    # Gradients of weights and of inputs, but the image's: the counter itself ignores the groups of these.
    return float(3 * forward.get_total_flops() - first.get_total_flops()) / 1e9


class OurStep:
    """The step by which a long run would train, on noise; its proof is kept for runs, as theirs is for it."""

    def __init__(self, world: World, spec: StepSpec, crop_px: int) -> None:
        kind, precision = world.device.type, str(spec.precision)
        config = bench_config(spec.network, spec.batch, crop_px, precision, kind, spec.keys)
        with patch.dict(vars(alexnet), STAND_INS[spec.norm]):
            self.parts = make_noise_parts(config, NUM_CLASSES, world)
        features = self.parts.network.features
        for name, layer in list(features.named_children()):
            if isinstance(layer, nn.Identity):  # else fused kernels would not know what they see
                delattr(features, name)
        fuse_lrn(self.parts.network, crop_px, self.parts.precision, world)
        if spec.compiled:
            compile_step(self.parts.network)
        sample = noise_batch(spec.batch, crop_px, NUM_CLASSES)
        self.sample = replace(sample, images=torch.from_numpy(sample.images).to(world.device))
        self.done, started = 0, time.perf_counter()
        with TemporaryDirectory() as folder:
            course = Course(num_images=WORTH_IMAGES, rate=LEARNING_RATE, step=0, folder=Path(folder))
            plain = partial(train_step, self.parts)
            self.run, _ = open_step(self.parts, plain, course, iter([[self.sample]]))
            self.record = read_record(Path(folder) / FILE)
        assert self.record is not None
        choice_s = time.perf_counter() - started  # with a proof, most of a cold start
        self.facts = {"choice_s": choice_s, "step": self.record.chosen, "why": self.record.why}

    def __call__(self, batch: Batch | None = None) -> AccuracyMeter:
        """Train one step."""
        self.done += 1
        return self.run([self.sample if batch is None else batch], LEARNING_RATE, self.done)


def torchvision_step(spec: StepSpec, crop_px: int, device: torch.device) -> Callable[[], None]:
    """Build what trains torchvision's `alexnet` as its script does, or as PyTorch's guides advise (`tuned`).

    Source: pytorch/vision, references/classification/train.py (SGD, momentum 0.9, weight decay 1e-4).
    """
    from torchvision.models import alexnet as torchvision_alexnet

    torch.backends.cudnn.benchmark = True  # as the script has it; TensorFloat-32 stays as torch has it
    torch.manual_seed(0)
    layout = LAYOUTS["channels_last" if spec.tuned else "contiguous"]
    model: nn.Module = torchvision_alexnet(num_classes=NUM_CLASSES).to(device, memory_format=layout)
    if spec.compiled:
        drop_toolkit_note()
        model.compile(mode=spec.compiled)
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE, 0.9, weight_decay=1e-4, fused=spec.tuned)
    precision = Precision(spec.precision or "fp32", device.type, "asked for")
    scaler, sample = precision.make_scaler(), noise_batch(spec.batch, crop_px, NUM_CLASSES)
    normalize = alexnet.Normalize(make_config("tiny-imagenet", []).preprocessing).to(device)
    images_NHWC, labels_N = (torch.from_numpy(x).to(device) for x in (sample.images, sample.labels))

    def step() -> None:
        inputs_NCHW = normalize(images_NHWC).contiguous(memory_format=layout)
        if spec.compiled == "reduce-overhead":
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        optimizer.zero_grad()
        with precision.autocast():
            loss = cross_entropy(model(inputs_NCHW), labels_N)
        torch.autograd.backward(scaler.scale(loss))
        scaler.step(optimizer)
        scaler.update()

    return step


class StepCase:
    """A step under measurement; the first ones compile, choose and capture."""

    def __init__(self, stack: ExitStack, device: Device, spec: StepSpec, crop_px: int) -> None:
        if device == "cpu":
            torch.set_num_threads(cpu_share(1))
        os.environ["KINETO_LOG_LEVEL"] = "6"  # the profiler prints that there is no GPU, else
        self.batch, self.crop_px, self.device = spec.batch, crop_px, torch.device(device)
        self.clock, started = partial(wait_for, self.device), time.perf_counter()
        self.step: Any
        if spec.network == "torchvision":
            self.step, self.facts = torchvision_step(spec, crop_px, self.device), {}
        else:
            world = stack.enter_context(open_world(device, deterministic="deterministic=true" in spec.keys))
            self.step = OurStep(world, spec, crop_px)
            self.facts = self.step.facts
        self.step()
        self.facts["first_step_s"] = self.clock() - started
        self.step()
        torch.cuda.empty_cache()  # of what choosing took: a dozen cases share the GPU

    def start(self) -> dict[str, str | float]:
        """Return the seconds from nothing to the end of the first step; of ours, which step runs and why."""
        return self.facts

    def measure(self, count: int, untimed: int = 0) -> dict[str, float]:
        """Return images/s of `count` steps after some that are not timed, and the peak of memory so far."""
        timeit(self.step, number=untimed)
        seconds = timeit(self.step, number=count, timer=self.clock)
        return {"images_per_s": count * self.batch / seconds, "peak_memory_mb": peak_memory_mb(self.device)}

    def measure_fed(self, count: int, photos: Path) -> dict[str, float]:
        """Return images/s of the loader, and of steps fed by it as in training: over the slower part, too."""
        # DALI, which the figures of the steps are without
        from train.bench.loaders import ENDLESS, PREFETCH, Subject, our_loader, time_batches

        counts, cores, gpu = AccuracyMeter(self.device), cpu_share(1), self.device.type == "cuda"
        subject = Subject("fed", our_loader, photos, cores, self.batch, self.crop_px, gpu=gpu, decoder="auto")

        def rate(use: Callable[[Batch], object]) -> float:
            with ExitStack() as stack:
                batches = our_loader(subject, stack, use)(ENDLESS)  # read ahead to the end, as in training
                # As many batches as are read ahead go first: then the queue is as full as it will stay.
                return time_batches(batches, count, untimed=PREFETCH + 1, clock=self.clock)[0]

        step, loader = self.measure(count)["images_per_s"], rate(len)
        fed = rate(lambda batch: counts.merge(self.step(batch)))
        figures = {"loader_images_per_s": loader, "end_to_end_images_per_s": fed}
        return figures | {"end_to_end_vs_slowest_part": fed / min(step, loader)}

    def profile(self, count: int = 3) -> dict[str, float]:
        """Return `count_events` of some steps; torch's profiler slows all that follows in this process."""
        with torch.profiler.profile() as found:
            timeit(self.step, number=count)
            self.clock()
        return count_events(found.key_averages(), self.device.type, count)


def count_events(events: Iterable[Any], device: str, steps: int) -> dict[str, float]:
    """Count the profiler's events of some steps; the figures of one, see docs/training-speed.md."""
    host, ran = ([e for e in events if e.device_type.name == kind] for kind in ("CPU", "CUDA"))
    found = {"operators": sum(event.count for event in host if event.key.startswith("aten::")) / steps}
    if device == "cuda":
        ran = [event for event in ran if not event.is_user_annotation]
        found["launches"] = sum(event.count for event in host if LAUNCH.match(event.key)) / steps
        found["kernels"] = sum(event.count for event in ran) / steps
        found["kernel_ms"] = sum(event.self_device_time_total for event in ran) / steps / 1e3
    return found


class PartsCase:
    """Parts of a step by themselves, which `make` gives, in exact float32 or less."""

    def __init__(self, stack: ExitStack, device: Device, make: Callable[..., Parts], *args: object) -> None:
        if device == "cpu":
            torch.set_num_threads(cpu_share(1))
        stack.enter_context(exact_float32())
        self.parts, self.clock = make(device, *args), partial(wait_for, torch.device(device))
        self.measure()  # compiles

    def measure(self, *_steps: int) -> dict[str, float]:
        """Return how much each does in a second, by the shortest of three times."""
        times_s = partial(repeat, timer=self.clock, number=1, repeat=3)
        return {figure: amount / min(times_s(work)) for figure, (amount, work) in self.parts.items()}


def gemm_parts(device: Device, precision: str) -> Parts:
    """Make square matrix products: the peak that MFU is a fraction of."""
    sides, kind = (2048, 3072) if device == "cpu" else (4096, 8192), TYPES[precision]
    pairs = [torch.randn(2, side, side, device=device).to(kind) for side in sides]
    return {f"gflops_{len(a)}": (2e-9 * len(a) ** 3, partial(torch.mm, a, b)) for a, b in pairs}


def lrn_parts(device: Device, layout: str, batch: int, crop_px: int) -> Parts:
    """Make the first LRN of `paper`, forward and backward, in three forms."""
    drop_toolkit_note()
    fused, side = LocalResponseNorm(), (crop_px + 4 - 11) // 4 + 1
    fused.fused = True
    forms = {"torch": nn.LocalResponseNorm(5, k=2.0), "eager": LocalResponseNorm(), "fused": fused}
    maps_NCHW = torch.randn(batch, 96, side, side, device=device)
    leaf = maps_NCHW.contiguous(memory_format=LAYOUTS[layout]).requires_grad_()

    def pass_both_ways(form: nn.Module) -> None:
        leaf.grad = None
        torch.autograd.backward(form(leaf), leaf.detach())

    return {f"{name}_images_per_s": (batch, partial(pass_both_ways, form)) for name, form in forms.items()}
