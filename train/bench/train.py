"""`alexnet bench train`: images/s of training, as a fraction of this machine's arithmetic, and torchvision's.

Fractions of the peak (MFU) compare the best round with the best matrix product of all rounds.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

from data_pipeline.common.errors import UserError
from train.bench import harness
from train.bench.flops import flops_of, gemm_gflops
from train.bench.harness import Case, Ratios, Report, four_digits, log
from train.bench.images import write_bench_images
from train.bench.lrn import LrnCase
from train.bench.steps import StepSpec, open_steps
from train.distributed.world import choose_device, cpu_share, exact_float32
from train.optim.precision import choose_precision

LIMIT_S: dict[str, float | None] = {"cpu": None, "cuda": 60}
"""What one subject may take, building and compiling included: more is cut off, and said."""
STEPS = {"cpu": 1, "cuda": 20}
FED_STEPS = {"cpu": 4, "cuda": 40}
PHASES = ("forward", "backward", "step", "loader", "end_to_end")
LRN_TEXT = {"none": " without LRN", "torch": " nn.LocalResponseNorm", "eager": " eager LRN", "fused": ""}
K = TypeVar("K")
PrecisionName = Literal["fp32", "bf16", "fp16"]


@dataclass
class Measured:
    """Results of the rounds.

    Attributes:
        seconds: for one batch in each round, by case and phase; `fed_step` is the step alone, measured again
            beside `loader` and `end_to_end`.
        gemm_gflops: the best matrix product by precision, in 1e9 operations a second.
        lrn_s: the best time of LRN alone, forward and backward, by memory format and form.
        cut_off: a sentence for each subject whose time was over; nothing else is kept of it.
    """

    crop_px: int
    seconds: defaultdict[tuple[StepSpec, str], list[float]] = field(default_factory=lambda: defaultdict(list))
    gemm_gflops: dict[str, float] = field(default_factory=dict)
    lrn_s: dict[str, dict[str, float]] = field(default_factory=dict)
    cut_off: list[str] = field(default_factory=list)


def bench_train(
    *, variants: Sequence[str], batches: Sequence[int], precisions: Sequence[PrecisionName], num_rounds: int,
    crop_px: int, compiled: bool, folder: Path | None, images: int, device: Literal["auto", "cpu", "cuda"],
) -> Report:  # fmt: skip
    """Measure training; the options are those of the command.

    Raises:
        UserError: a folder that holds something else, or fewer images than a batch.
    """
    if images < max(batches):
        raise UserError(f"num_images must be at least the largest batch, {max(batches)}, not {images}")
    kind = choose_device(device)
    best = choose_precision("auto", torch.device(kind)).name
    precisions = precisions or tuple(dict.fromkeys((best, "fp32")))
    for precision in precisions:
        choose_precision(precision, torch.device(kind))
    folder = write_bench_images(folder, images)
    measured = Measured(crop_px)
    cases: dict[StepSpec, Case] = {}
    with ExitStack() as stack:
        if kind == "cpu":
            stack.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(cpu_share(1))
        stack.enter_context(exact_float32())
        for spec in make_specs(variants, batches, precisions, compiled):
            log.info(f"starting {label(spec)}")
            with cutting_off(measured, cases, spec):
                cases[spec] = Case(stack, open_steps, spec, crop_px, folder, kind, limit_s=LIMIT_S[kind])
        lrn: dict[str, Case] = {}
        if "paper" in variants:
            shape = (min(batches[0], 64), (crop_px + 4 - 11) // 4 + 1)
            with cutting_off(measured, lrn, "LRN alone"):
                lrn["LRN alone"] = Case(stack, LrnCase, *shape, kind, limit_s=LIMIT_S[kind])
        for _ in harness.rounds(num_rounds):
            measure_passes(measured, cases, precisions, kind)
            for name, case in list(lrn.items()):
                with cutting_off(measured, lrn, name):
                    measure_lrn(measured, case)
        started = {spec: case.request("first_step_and_memory") for spec, case in cases.items()}
        for _ in harness.rounds(num_rounds, "fed by the loader, "):
            measure_fed(measured, cases, batches[0], precisions[0], kind)
    ratios, notes = make_ratios(list(cases), measured)
    notes += measured.cut_off
    return {
        "machine": harness.machine_name(kind),
        "crop_px": crop_px,
        "gemm_gflops": {name: four_digits(value) for name, value in measured.gemm_gflops.items()},
        "rates": [
            {"subject": spec, "flops_per_image": flops_of(spec, crop_px),
             "phases": make_phases(spec, measured),
             "peak_memory_mb": round(memory_mb), "first_step_s": round(first_s, 1)}
            for spec, (first_s, memory_mb) in started.items() if spec in cases
        ],
        "lrn_s": {
            layout: {form: four_digits(value) for form, value in best.items()}
            for layout, best in measured.lrn_s.items()
        },
        "ratios": ratios,
        "notes": notes,
    }  # fmt: skip


def make_specs(
    variants: Sequence[str], batches: Sequence[int], precisions: Sequence[PrecisionName], compiled: bool
) -> list[StepSpec]:
    """List the cases: each network in each way asked for, and those that the ratios compare with."""
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
        specs.append(StepSpec(name="paper", batch=batches[0], precision=precisions[0], lrn="none"))
        specs.append(StepSpec(name="paper", batch=batches[0], precision="fp32", lrn="torch"))
    return specs


def label(spec: StepSpec) -> str:
    """Name a case in a few words, for people."""
    compiled = " compiled" if spec.compiled else ""
    return f"{spec.name}{LRN_TEXT[spec.lrn]} {spec.precision} batch {spec.batch}{compiled}"


def measure_passes(
    measured: Measured, cases: dict[StepSpec, Case], precisions: Sequence[PrecisionName], device: str
) -> None:
    """Measure a round of matrix products, and of the passes of every case."""
    for precision in dict.fromkeys((*precisions, "fp32")):
        fastest = gemm_gflops(precision, device)
        measured.gemm_gflops[precision] = max(measured.gemm_gflops.get(precision, 0), fastest)
    for spec, case in list(cases.items()):
        with cutting_off(measured, cases, spec):
            for phase, value in case.request("time_passes", STEPS[device]).items():
                measured.seconds[spec, phase].append(value)


@contextmanager
def cutting_off(measured: Measured, cases: dict[K, Case], key: K) -> Iterator[None]:
    """Forget a case whose time is over, and what was measured of it; the others go on."""
    try:
        yield
    except harness.OutOfTimeError as error:
        cases.pop(key, None)
        if isinstance(key, StepSpec):
            for known in [known for known in measured.seconds if known[0] == key]:
                del measured.seconds[known]
        else:
            measured.lrn_s.clear()
        measured.cut_off.append(f"{label(key) if isinstance(key, StepSpec) else key}: {error}")
        log.warning(measured.cut_off[-1])


def measure_lrn(measured: Measured, case: Case) -> None:
    """Measure a round of the first LRN of `paper`; the best times are kept."""
    for layout, found in case.request("measure").items():
        best = measured.lrn_s.setdefault(layout, {})
        for form, seconds in found.items():
            best[form] = min(best.get(form, seconds), seconds)


def measure_fed(
    measured: Measured, cases: dict[StepSpec, Case], batch: int, precision: PrecisionName, device: str
) -> None:
    """Measure a round of our plain networks: the step, the loader and both together, in the same minutes."""
    for spec, case in list(cases.items()):
        if spec != StepSpec(name=spec.name, batch=batch, precision=precision) or spec.name == "torchvision":
            continue
        with cutting_off(measured, cases, spec):
            alone = case.request("time_passes", FED_STEPS[device])["step"]
            measured.seconds[spec, "fed_step"].append(alone)
            for phase in ("loader", "end_to_end"):
                rate = case.request("fed_images_per_s", FED_STEPS[device], phase == "end_to_end")
                measured.seconds[spec, phase].append(spec.batch / rate)


def make_phases(spec: StepSpec, measured: Measured) -> dict[str, dict[str, Any]]:
    """Return rates by phase; `mfu` compares the best round with the best matrix product."""
    flops = flops_of(spec, measured.crop_px)
    phases = {}
    for phase in PHASES:
        if (spec, phase) in measured.seconds:
            rates = [spec.batch / value for value in measured.seconds[spec, phase]]
            work = {"forward": flops.forward, "backward": flops.backward}.get(phase, flops.step)
            mfu = max(rates) * work / measured.gemm_gflops[spec.precision] / 1e9
            rate = harness.rate(rates)
            phases[phase] = {
                "images_per_s": rate["images_per_s"],
                "mfu": None if phase == "loader" else four_digits(mfu),
                "rounds": rate["rounds"],
            }
    return phases


def make_ratios(specs: Sequence[StepSpec], measured: Measured) -> tuple[Ratios, list[str]]:
    """Return the promised ratios, of the first batch and precision, and the notes on them."""
    seconds = measured.seconds
    # Reversed, so that the first of several precisions and batches stays.
    first = {(s.name, s.lrn): s for s in reversed(specs) if not s.compiled}
    step_s = {key: seconds[spec, "step"] for key, spec in first.items()}
    owt_s, paper_s = step_s.get(("owt", "fused")), step_s.get(("paper", "fused"))

    def lrn(form: str) -> float | None:
        return min((best["torch"] / best[form] for best in measured.lrn_s.values()), default=None)

    def end_to_end(spec: StepSpec) -> float | None:
        slower = [*map(max, seconds[spec, "fed_step"], seconds[spec, "loader"])]
        return harness.median_ratio(slower, seconds[spec, "end_to_end"])

    fed = [end_to_end(spec) for spec in specs if (spec, "end_to_end") in seconds]
    ratios, notes = harness.round_ratios(
        {
            "owt_vs_torchvision_reference": harness.median_ratio(step_s.get(("torchvision", "fused")), owt_s),
            "owt_mfu": make_phases(first["owt", "fused"], measured)["step"]["mfu"] if owt_s else None,
            "paper_vs_no_lrn": harness.median_ratio(step_s.get(("paper", "none")), paper_s),
            "paper_vs_torch_lrn": harness.median_ratio(step_s.get(("paper", "torch")), paper_s),
            "lrn_eager_vs_torch": lrn("eager"),
            "lrn_fused_vs_torch": lrn("fused"),
            "end_to_end_vs_slowest_part": min(filter(None, fed), default=None),
        }
    )
    if paper_s:
        notes.append("paper_vs_torch_lrn: against the same net in float32; lrn_*: the worse memory format")
    if fed:
        notes.append(
            "end_to_end_vs_slowest_part: the worst of the networks; loader and steps share the cores"
        )
    return ratios, notes


def describe(report: Report) -> list[str]:
    """Return the peaks, a table row for each case, the ratios and the notes."""
    rows = []
    for rate in report["rates"]:
        cells: list[str | None] = []
        for phase in map(rate["phases"].get, PHASES):
            mfu = "" if phase is None or phase["mfu"] is None else f" ({phase['mfu']:.2f})"
            cells.append(None if phase is None else f"{phase['images_per_s']:.1f}{mfu}")
        gflops = rate["flops_per_image"].step / 1e9
        rows.append([label(rate["subject"]), *cells, gflops, rate["peak_memory_mb"]])
    columns = [("images/s (MFU)", "<42"), *((phase, ">16") for phase in PHASES)]
    columns += [("GFLOP/image", ">13.2f"), ("MB", ">7.0f")]
    return [
        f"{report['machine']}, images of {report['crop_px']} pixels",
        *(f"GEMM peak {name}: {value:.0f} GFLOP/s" for name, value in report["gemm_gflops"].items()),
        *harness.table_lines(columns, rows),
        *(
            f"LRN, {layout}: " + ", ".join(f"{form} {s * 1e3:.1f} ms" for form, s in times.items())
            for layout, times in report["lrn_s"].items()
        ),
        *harness.ratio_lines(report["ratios"], digits=3),
        *report["notes"],
    ]
