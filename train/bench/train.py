"""`alexnet bench train`: how close training comes to this machine's arithmetic, and how far ahead.

Everything is measured in one run and in turns, so that what else the machine does hits all alike. Rates are
medians, ratios medians of the ratios within a turn; fractions of the peak (MFU) set the best turn against the
best matrix product of all turns.
"""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Literal

import msgspec
import torch

from data_pipeline.common.errors import UserError
from train.bench.flops import Flops, count_flops
from train.bench.images import make_bench_folder, write_bench_images
from train.bench.lrn import bench_lrn
from train.bench.steps import NUM_CLASSES, Bench, StepSpec, bench_config
from train.bench.turns import four_digits, open_subject
from train.distributed.world import choose_device, cpu_share, exact_float32
from train.models.alexnet import make_model
from train.optim.precision import choose_precision
from train.tune.steps import wait_for

GEMM_SIDES = {"cpu": (2048, 3072), "cuda": (4096, 8192)}
GEMM_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FED_STEPS = {"cpu": 4, "cuda": 40}
STEPS = {"cpu": 1, "cuda": 20}
PHASES = ("forward", "backward", "step", "loader", "end_to_end")
Seconds = dict[tuple[StepSpec, str], list[float]]
"""For each subject and phase, seconds for one batch in each round."""


class Phase(msgspec.Struct, frozen=True, kw_only=True):
    """One phase of one subject.

    Args:
        images_per_s: the median of its rounds.
        mfu: arithmetic of the best round as a fraction of the best matrix product's; None for the loader.
        rounds: images per second in each.
    """

    images_per_s: float
    mfu: float | None
    rounds: list[float]


class TrainRate(msgspec.Struct, frozen=True, kw_only=True):
    """What one subject did.

    Args:
        subject: which.
        flops_per_image: what the fractions are taken of.
        phases: by name; `loader` and `end_to_end` where they were measured.
        peak_memory_mb: of its process (CPU) or of torch on the device (GPU), without the loader.
        first_step_s: from nothing to the end of the first step: building, compiling where it compiles.
    """

    subject: StepSpec
    flops_per_image: Flops
    phases: dict[str, Phase]
    peak_memory_mb: float
    first_step_s: float


class TrainReport(msgspec.Struct, frozen=True, kw_only=True):
    """What `bench_train` measured.

    Args:
        machine: processor, cores or GPU.
        crop_px: side of the images.
        gemm_gflops: the best matrix product by precision, in 1e9 operations a second.
        rates: a row for each subject.
        lrn_s: seconds for LRN alone, forward and backward: `torch`, `eager` and `fused` by memory format.
        ratios: the promised ones by name; None where not measured, and `notes` says why.
        notes: what a reader must know.
    """

    machine: str
    crop_px: int
    gemm_gflops: dict[str, float]
    rates: list[TrainRate]
    lrn_s: dict[str, dict[str, float]]
    ratios: dict[str, float | None]
    notes: list[str]


def bench_train(
    *,
    variants: Sequence[Literal["paper", "caffe", "owt", "bn"]] = ("owt", "paper"),
    batches: Sequence[int] = (128,),
    precisions: Sequence[Literal["fp32", "bf16", "fp16"]] = (),
    rounds: int = 5,
    crop_px: int = 224,
    compiled: bool = False,
    folder: Path | None = None,
    num_images: int = 2000,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    tell: Callable[[str], None] = lambda text: None,
) -> TrainReport:
    """Measure training in turns.

    Args:
        variants: networks; the ratios about `owt` and `paper` need those.
        batches: samples of a step; the ratios are of the first.
        precisions: none for what `precision = "auto"` chooses and float32; the ratios are of the first.
        rounds: turns.
        crop_px: side of the images.
        compiled: measure each network compiled as a whole, too.
        folder: where the JPEGs are or are to be written; None for a folder among the temporary files.
        num_images: how many.
        tell: called with a line on what is being done.
    Raises:
        UserError: a folder that holds something else, or fewer images than a batch.
    """
    if num_images < max(batches):
        raise UserError(f"num_images must be at least the largest batch, {max(batches)}, not {num_images}")
    kind = choose_device(device)
    if not precisions:
        best = choose_precision("auto", torch.device(kind)).name
        precisions = (best,) if best == "fp32" else (best, "fp32")
    for precision in precisions:
        choose_precision(precision, torch.device(kind))
    folder = make_bench_folder() / str(num_images) if folder is None else folder
    tell(f"{num_images} images in {folder}")
    write_bench_images(folder, num_images)
    bench = Bench(crop_px=crop_px, folder=str(folder), device=kind)
    specs = make_specs(variants, batches, precisions, compiled)
    seconds: Seconds = {}
    gemm = dict.fromkeys([*precisions, *(() if "fp32" in precisions else ("fp32",))], 0.0)
    lrn_s: dict[str, dict[str, list[float]]] = {}
    threads = torch.get_num_threads()
    with ExitStack() as stack:
        if kind == "cpu":
            stack.callback(torch.set_num_threads, threads)
            torch.set_num_threads(cpu_share(1))
        stack.enter_context(exact_float32())
        ask = {}
        for spec in specs:
            tell(f"starting {label(spec)}")
            words = [msgspec.json.encode(value).decode() for value in (spec, bench)]
            ask[spec] = stack.enter_context(open_subject("train.bench.steps", words))
        for number in range(rounds):
            tell(f"round {number + 1} of {rounds}")
            for precision in gemm:
                gemm[precision] = max(gemm[precision], gemm_gflops(precision, kind))
            for spec in specs:
                for phase, value in ask[spec]("passes", STEPS[kind]).items():
                    seconds.setdefault((spec, phase), []).append(value)
            if "paper" in variants:
                bench_lrn(lrn_s, batch=min(batches[0], 64), crop_px=crop_px, device=kind)
        first = {spec: ask[spec]("first") for spec in specs}
        memory = {spec: ask[spec]("memory") for spec in specs}  # before the loader is there
        fed = [s for s in specs if s.lrn == "fused" and s.name != "torchvision" and not s.compiled]
        fed = [s for s in fed if (s.batch, s.precision) == (batches[0], precisions[0])]
        for number in range(rounds):
            tell(f"fed by the loader, round {number + 1} of {rounds}")
            for spec in fed:
                # The step alone once more, so that it is measured in the same minute.
                alone = ask[spec]("passes", FED_STEPS[kind])["step"]
                seconds.setdefault((spec, "fed_step"), []).append(alone)
                for phase in ("loader", "end_to_end"):
                    rate = ask[spec](phase, FED_STEPS[kind])
                    seconds.setdefault((spec, phase), []).append(spec.batch / rate)
    name = torch.cuda.get_device_name() if kind == "cuda" else f"{len(os.sched_getaffinity(0))} cores"
    lrn_best = {key: {k: min(v) for k, v in times.items()} for key, times in lrn_s.items()}
    ratios, notes = make_ratios(specs, seconds, lrn_best, gemm, crop_px)
    return TrainReport(
        machine=f"{platform.machine()}, {name}",
        crop_px=crop_px,
        gemm_gflops={name: four_digits(value) for name, value in gemm.items()},
        rates=[
            TrainRate(
                subject=spec,
                flops_per_image=flops_of(spec, crop_px),
                phases=make_phases(spec, seconds, gemm, crop_px),
                peak_memory_mb=round(memory[spec]),
                first_step_s=round(first[spec], 1),
            )
            for spec in specs
        ],
        lrn_s={key: {k: four_digits(v) for k, v in times.items()} for key, times in lrn_best.items()},
        ratios=ratios,
        notes=notes,
    )


def make_specs(
    variants: Sequence[str],
    batches: Sequence[int],
    precisions: Sequence[Literal["fp32", "bf16", "fp16"]],
    compiled: bool,
) -> list[StepSpec]:
    """The subjects: each network in each way asked for, and those that the ratios compare with."""
    specs = [
        StepSpec(name=name, batch=batch, precision=precision, compiled=whole)
        for name in variants
        for batch in batches
        for precision in precisions
        for whole in ((False, True) if compiled else (False,))
    ]  # fmt: skip
    if "owt" in variants:
        specs.append(StepSpec(name="torchvision", batch=batches[0], precision="fp32"))
    if "paper" in variants:
        paper = StepSpec(name="paper", batch=batches[0], precision=precisions[0])
        specs += [
            msgspec.structs.replace(paper, lrn="none"),
            msgspec.structs.replace(paper, lrn="torch", precision="fp32"),
        ]
    return specs


def label(spec: StepSpec) -> str:
    """A subject in a few words, for people."""
    lrn = {"none": " without LRN", "torch": " nn.LocalResponseNorm", "eager": " eager LRN", "fused": ""}
    compiled = " compiled" if spec.compiled else ""
    return f"{spec.name}{lrn[spec.lrn]} {spec.precision} batch {spec.batch}{compiled}"


def flops_of(spec: StepSpec, crop_px: int) -> Flops:
    """The arithmetic of a subject's network; normalisations are not counted."""
    with torch.device("meta"):
        if spec.name == "torchvision":
            from torchvision.models import alexnet

            return count_flops(alexnet(num_classes=NUM_CLASSES), crop_px)
        config = bench_config(spec, Bench(crop_px=crop_px, folder="", device="cpu"))
        return count_flops(make_model(config.model, num_classes=NUM_CLASSES, crop_px=crop_px), crop_px)


def gemm_gflops(precision: str, device: str) -> float:
    """The fastest of a few square matrix products, in 1e9 operations a second."""
    fastest = 0.0
    for side in GEMM_SIDES[device]:
        a, b = (torch.randn(side, side, device=device).to(GEMM_TYPES[precision]) for _ in range(2))
        torch.mm(a, b)
        for _ in range(3):
            started = wait_for(a.device)
            torch.mm(a, b)
            fastest = max(fastest, 2 * side**3 / (wait_for(a.device) - started))
    return fastest / 1e9


def make_phases(spec: StepSpec, seconds: Seconds, gemm: dict[str, float], crop_px: int) -> dict[str, Phase]:
    """Seconds for a batch as images a second and fractions of the peak."""
    flops = flops_of(spec, crop_px)
    work = {
        "forward": flops.forward,
        "backward": flops.backward,
        "step": flops.step,
        "end_to_end": flops.step,
    }
    phases = {}
    for phase in PHASES:
        if (spec, phase) in seconds:
            rates = [spec.batch / value for value in seconds[spec, phase]]
            mfu = max(rates) * work[phase] / gemm[spec.precision] / 1e9 if phase in work else None
            phases[phase] = Phase(
                images_per_s=four_digits(statistics.median(rates)),
                mfu=None if mfu is None else four_digits(mfu),
                rounds=[four_digits(rate) for rate in rates],
            )
    return phases


def make_ratios(
    specs: Sequence[StepSpec],
    seconds: Seconds,
    lrn_s: dict[str, dict[str, float]],
    gemm: dict[str, float],
    crop_px: int,
) -> tuple[dict[str, float | None], list[str]]:
    """The promised ratios, of the first batch and precision, and a note for each that cannot be had."""

    def find(name: str, lrn: str = "fused") -> StepSpec | None:
        return next((s for s in specs if (s.name, s.lrn, s.compiled) == (name, lrn, False)), None)

    def faster(ours: StepSpec | None, theirs: StepSpec | None) -> float | None:
        """How many times as fast: the median over the rounds."""
        if ours is None or theirs is None:
            return None
        pairs = zip(seconds[ours, "step"], seconds[theirs, "step"], strict=True)
        return statistics.median(b / a for a, b in pairs)

    def lrn(ours: str) -> float | None:
        return min((times["torch"] / times[ours] for times in lrn_s.values()), default=None)

    owt, paper = find("owt"), find("paper")
    fed = [spec for spec in specs if (spec, "end_to_end") in seconds]
    ratios = {
        "owt_vs_torchvision_reference": faster(owt, find("torchvision")),
        "owt_mfu": make_phases(owt, seconds, gemm, crop_px)["step"].mfu if owt is not None else None,
        "paper_vs_no_lrn": faster(paper, find("paper", "none")),
        "paper_vs_torch_lrn": faster(paper, find("paper", "torch")),
        "lrn_eager_vs_torch": lrn("eager"),
        "lrn_fused_vs_torch": lrn("fused"),
        "end_to_end_vs_slowest_part": min((_end_to_end(spec, seconds) for spec in fed), default=None),
    }
    notes = [f"{name}: not measured" for name, value in ratios.items() if value is None]
    if paper is not None:
        notes.append("paper_vs_torch_lrn: against the same net in float32; lrn_*: the worse memory format")
    if fed:
        notes.append(
            "end_to_end_vs_slowest_part: the worst of the networks; loader and steps share the cores"
        )
    return {k: None if v is None else four_digits(v) for k, v in ratios.items()}, notes


def _end_to_end(spec: StepSpec, seconds: Seconds) -> float:
    steps, loads, both = (seconds[spec, phase] for phase in ("fed_step", "loader", "end_to_end"))
    return statistics.median(
        max(step, load) / end for step, load, end in zip(steps, loads, both, strict=True)
    )


def describe(report: TrainReport) -> str:
    """The report for people: peaks, a row for each subject, then the ratios and the notes."""
    lines = [f"{report.machine}, images of {report.crop_px} pixels"]
    lines += [f"GEMM peak {name}: {value:.0f} GFLOP/s" for name, value in report.gemm_gflops.items()]
    lines.append(
        f"{'images/s (MFU)':<42}" + "".join(f"{name:>16}" for name in PHASES) + "  GFLOP/image     MB"
    )
    for rate in report.rates:
        cells = [rate.phases.get(name) for name in PHASES]
        lines.append(
            f"{label(rate.subject):<42}"
            + "".join(f"{_cell(cell):>16}" for cell in cells)
            + f"{rate.flops_per_image.step / 1e9:>13.2f}{rate.peak_memory_mb:>7.0f}"
        )
    for layout, times in report.lrn_s.items():
        lines.append(f"LRN, {layout}: " + ", ".join(f"{k} {v * 1e3:.1f} ms" for k, v in times.items()))
    lines += [
        f"{name:<30} " + ("not measured" if ratio is None else f"{ratio:.3f}")
        for name, ratio in report.ratios.items()
    ]
    return "\n".join([*lines, *report.notes])


def _cell(phase: Phase | None) -> str:
    if phase is None:
        return "-"
    return f"{phase.images_per_s:.1f}" + ("" if phase.mfu is None else f" ({phase.mfu:.2f})")
