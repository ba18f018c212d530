"""`alexnet bench train`: images/s of training, as a fraction of this machine's arithmetic, and torchvision's.

Fractions of the peak (MFU) compare the best round with the best matrix product of all rounds.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from data_pipeline.common.errors import UserError
from train.bench import harness
from train.bench.harness import Case, CaseError, Ratios, Report, Turns, four_digits, log, median_ratio
from train.bench.images import write_bench_images
from train.bench.steps import LrnCase, open_steps
from train.bench.subjects import DEFAULT, NETWORKS, TORCHVISION, PrecisionName, StepSpec, make_specs
from train.bench.trainer import flops_of, gemm_gflops
from train.distributed.numerics import exact_float32
from train.distributed.world import choose_device, cpu_share
from train.graphs.verdict import PLAIN
from train.optim.precision import choose_precision

LIMIT_S: dict[str, float | None] = {"cpu": None, "cuda": 60}
"""Seconds for one subject, building and compiling included; a longer one is cut off, and its row says so."""
OUR_BUILD_LIMIT_S: dict[str, float | None] = {"cpu": None, "cuda": 180}
"""Seconds for building one of ours, beside that: on a new machine its step is proved first."""
BATCHES = {"cpu": (128,), "cuda": (128, 1024)}
STEPS = {"cpu": (2, 0), "cuda": (40, 10)}
"""Timed in each round, and run before them."""
FED_STEPS = {"cpu": 4, "cuda": 40}
PHASES = ("step", "loader", "end_to_end")
FIGURES = {
    "gflop_per_image": ("GFLOP/image", ">13.2f"), "operators": ("operators", ">11.0f"),
    "launches": ("launches", ">10.0f"), "kernels": ("kernels", ">9.0f"), "kernel_ms": ("kernel ms", ">11.2f"),
    "choice_s": ("choice s", ">10.1f"), "first_step_s": ("first step s", ">14.1f"),
    "peak_memory_mb": ("MB", ">8.0f"),
}  # fmt: skip
"""Of a row beside its phases, with heading and format."""


@dataclass
class Measured:
    """Results of the rounds.

    Attributes:
        seconds: for one batch in each round, by case and phase; `fed_step` is the step alone, measured again
            beside `loader` and `end_to_end`.
        gemm_gflops: the best matrix product by precision, in 1e9 operations a second.
        lrn_s: the best time of LRN alone, forward and backward, by memory format and form.
        figures: what else is known of a case: keys of `FIGURES`, and of ours `step` and `why` of the
            trainer's choice: the step that was measured.
        failures: why a case ended early; phases that lack a round are forgotten.
    """

    crop_px: int
    seconds: defaultdict[tuple[StepSpec, str], list[float]] = field(default_factory=lambda: defaultdict(list))
    gemm_gflops: dict[str, float] = field(default_factory=dict)
    lrn_s: dict[str, dict[str, float]] = field(default_factory=dict)
    figures: defaultdict[StepSpec, dict[str, Any]] = field(default_factory=lambda: defaultdict(dict))
    failures: dict[StepSpec | str, str] = field(default_factory=dict)


def bench_train(
    *, only: Sequence[str], batches: Sequence[int], precision: Literal["auto", PrecisionName],
    num_rounds: int, crop_px: int, folder: Path | None, images: int, device: Literal["auto", "cpu", "cuda"],
) -> Report:  # fmt: skip
    """Measure training; the options are those of the command.

    Raises:
        UserError: a folder that holds something else, or fewer images than the first batch.
    """
    kind = choose_device(device)
    only, batches = only or DEFAULT[kind], batches or BATCHES[kind]
    chosen = choose_precision(precision, torch.device(kind)).name
    if "end_to_end" in only:
        if images < batches[0]:
            raise UserError(f"num_images must be at least the first batch, {batches[0]}, not {images}")
        folder = write_bench_images(folder, images)
    specs, measured = make_specs(only, batches, chosen, kind), Measured(crop_px)
    # The loader feeds our networks as they train, at the first batch.
    fed = {StepSpec(name, name, chosen, batch=batches[0]) for name in NETWORKS if "end_to_end" in only}
    with ExitStack() as stack:
        if kind == "cpu":
            stack.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(cpu_share(1))
        stack.enter_context(exact_float32())
        for batch in dict.fromkeys(batches):  # one after the other: all at once would not fit on a GPU
            of_batch = [spec for spec in specs if spec.batch == batch]
            measure_batch(measured, of_batch, fed, num_rounds, folder or Path(), kind)
        if "lrn" in only:
            measure_lrn(measured, num_rounds, min(batches[0], 64), kind)
    ratios, notes = make_ratios(specs, measured)
    return {
        "machine": harness.machine_name(kind),
        "crop_px": crop_px,
        "gemm_gflops": {name: four_digits(value) for name, value in measured.gemm_gflops.items()},
        "rates": [make_row(spec, measured) for spec in specs],
        "lrn_s": {
            layout: {form: four_digits(value) for form, value in best.items()}
            for layout, best in measured.lrn_s.items()
        },
        "ratios": ratios,
        "notes": [*notes, *(f"{key}: {why}" for key, why in measured.failures.items())],
    }


def measure_batch(
    measured: Measured, specs: Sequence[StepSpec], fed: set[StepSpec], num_rounds: int, folder: Path,
    device: Literal["cpu", "cuda"],
) -> None:  # fmt: skip
    """Measure the cases of one batch size, in turns: their steps, beside the loader, and what they launch."""

    def open_case(stack: ExitStack, spec: StepSpec) -> Case:
        return Case(
            stack, open_steps, spec, measured.crop_px, folder, device, limit_s=LIMIT_S[device],
            build_limit_s=build_limit_s(spec, device), build=False,
        )  # fmt: skip

    def start(case: Case) -> dict[str, Any]:
        log.info(f"starting {case.name}")
        case.build()
        choice: dict[str, Any] = case.request("choice")
        return choice

    with ExitStack() as stack:
        cases = Turns({spec: open_case(stack, spec) for spec in specs})
        for spec, found in cases.each(start):
            measured.figures[spec] |= found
        for _ in harness.rounds(num_rounds):
            for precision in dict.fromkeys(spec.precision or "fp32" for spec in specs):
                fastest = gemm_gflops(precision, device)
                measured.gemm_gflops[precision] = max(measured.gemm_gflops.get(precision, 0), fastest)
            for spec, seconds in cases.ask("step_s", *STEPS[device]):
                measured.seconds[spec, "step"].append(seconds)
        for spec, found in cases.ask("start_and_memory"):
            measured.figures[spec] |= found | {"gflop_per_image": flops_of(spec, measured.crop_px) / 1e9}
        for _ in harness.rounds(num_rounds if fed & set(specs) else 0, "fed by the loader, "):
            for spec, found in cases.ask("fed_s", FED_STEPS[device], only=fed):
                for phase, seconds in found.items():
                    measured.seconds[spec, phase].append(seconds)
        for spec, found in cases.ask("profile"):
            measured.figures[spec] |= found
    for spec, why in cases.failures.items():
        measured.failures[spec] = why
    for key in [key for key, times in measured.seconds.items() if len(times) < num_rounds]:
        del measured.seconds[key]


def build_limit_s(spec: StepSpec, device: str) -> float | None:
    """Return the seconds that building a case may take by itself; None where they count among all."""
    return None if spec.network == "torchvision" else OUR_BUILD_LIMIT_S[device]


def measure_lrn(measured: Measured, num_rounds: int, batch: int, device: Literal["cpu", "cuda"]) -> None:
    """Measure the first LRN of `paper` by itself; the best times are kept."""
    side = (measured.crop_px + 4 - 11) // 4 + 1
    try:
        with ExitStack() as stack:
            case = Case(stack, LrnCase, batch, side, device, limit_s=LIMIT_S[device])
            for _ in harness.rounds(num_rounds, "LRN alone, "):
                for layout, found in case.request("measure").items():
                    best = measured.lrn_s.setdefault(layout, found)
                    best |= {form: min(best[form], seconds) for form, seconds in found.items()}
    except CaseError as error:
        measured.failures["lrn"] = str(error)
        log.warning(str(error))


def make_phases(spec: StepSpec, measured: Measured) -> dict[str, dict[str, Any]]:
    """Return rates by phase; `mfu` compares the best round with the best matrix product."""
    phases = {}
    for phase in PHASES:
        if (spec, phase) in measured.seconds:
            rates = [spec.batch / value for value in measured.seconds[spec, phase]]
            work = flops_of(spec, measured.crop_px)
            mfu = max(rates) * work / measured.gemm_gflops[spec.precision or "fp32"] / 1e9
            phases[phase] = harness.rate(rates) | {"mfu": None if phase == "loader" else four_digits(mfu)}
    return phases


def make_row(spec: StepSpec, measured: Measured) -> dict[str, Any]:
    """Return all that is known of a case: its figures, or why it has none."""
    figures = measured.figures[spec].items()
    return {
        "subject": spec,
        "step": None,
        "why": None,
        "phases": make_phases(spec, measured),
        **dict.fromkeys(FIGURES),
        **{name: four_digits(value) if isinstance(value, float) else value for name, value in figures},
        "failure": measured.failures.get(spec),
    }


def make_ratios(specs: Sequence[StepSpec], measured: Measured) -> tuple[Ratios, list[str]]:
    """Return the promised ratios, and the notes on them.

    Those of the first batch have plain names; of another there are six, with its size at the end.
    """
    ratios: Ratios = {}
    notes: list[str] = []
    reasons: dict[str, str] = {}
    for batch in dict.fromkeys(spec.batch for spec in specs):
        of_batch = {spec.subject: spec for spec in specs if spec.batch == batch}
        step_s = {name: measured.seconds.get((spec, "step")) for name, spec in of_batch.items()}
        owt_s, paper_s = step_s.get("owt"), step_s.get("paper")
        runs_plain = "owt" in of_batch and measured.figures[of_batch["owt"]].get("step") == PLAIN
        ways = {way.subject: median_ratio(step_s.get(way.subject), owt_s) for way in TORCHVISION}
        known = {name: ratio for name, ratio in ways.items() if ratio is not None}
        best = min(known, key=known.__getitem__, default="")
        end = f"_at_{batch}" if ratios else ""
        ratios |= {
            f"owt_vs_best_torchvision{end}": known.get(best),
            f"owt_mfu{end}": make_phases(of_batch["owt"], measured)["step"]["mfu"] if owt_s else None,
            f"paper_vs_no_lrn{end}": median_ratio(step_s.get("paper_no_lrn"), paper_s),
            f"bn_vs_no_norm{end}": median_ratio(step_s.get("bn_no_norm"), step_s.get("bn")),
            f"owt_fast_vs_plain{end}": None if runs_plain else median_ratio(step_s.get("owt_plain"), owt_s),
            f"owt_deterministic_vs_owt{end}": median_ratio(owt_s, step_s.get("owt_deterministic")),
        }
        if runs_plain:
            reasons[f"owt_fast_vs_plain{end}"] = "owt runs by the plain step itself"
        if best:
            notes.append(f"owt_vs_best_torchvision{end}: {best} is the best of {', '.join(known)}")
        if not end:
            ratios["owt_vs_torchvision_reference"] = ways["torchvision_fp32"]
            ratios["paper_vs_torch_lrn"] = ratio = median_ratio(step_s.get("paper_torch_lrn"), paper_s)
            notes += ["paper_vs_torch_lrn: against the same net in float32"] * bool(ratio)
    for form in ("eager", "fused"):
        found = (best["torch"] / best[form] for best in measured.lrn_s.values())
        ratios[f"lrn_{form}_vs_torch"] = min(found, default=None)
    of = measured.seconds
    fed = [
        median_ratio([*map(max, of[spec, "fed_step"], of[spec, "loader"])], of[spec, "end_to_end"])
        for spec in specs
        if (spec, "end_to_end") in of
    ]
    ratios["end_to_end_vs_slowest_part"] = worst = min(filter(None, fed), default=None)
    notes += ["lrn_*: the worse memory format"] * bool(measured.lrn_s)
    if worst:
        notes.append("end_to_end_vs_slowest_part: the worst network; loader and steps share the cores")
    rounded, missing = harness.round_ratios(ratios, others=reasons)
    return rounded, [*missing, *notes]


def describe(report: Report) -> list[str]:
    """Return the peaks, a table row for each case, the ratios and the notes."""
    rows = []
    for rate in report["rates"]:
        cells: list[object] = [str(rate["subject"]), rate["step"]]
        for phase in map(rate["phases"].get, PHASES):
            mfu = "" if phase is None or phase["mfu"] is None else f" ({phase['mfu']:.2f})"
            cells.append(None if phase is None else f"{phase['images_per_s']:.1f}{mfu}")
        rows.append([*cells, *(rate[name] for name in FIGURES), rate["failure"] or ""])
    columns = [("images/s (MFU)", "<34"), ("by", "<24"), *((phase, ">16") for phase in PHASES)]
    columns += [*FIGURES.values(), ("", "")]
    return [
        f"{report['machine']}, images of {report['crop_px']} pixels",
        *(f"GEMM peak {name}: {value:.0f} GFLOP/s" for name, value in report["gemm_gflops"].items()),
        *harness.table_lines(columns, rows),
        *choice_lines(report["rates"]),
        *(
            f"LRN, {layout}: " + ", ".join(f"{form} {s * 1e3:.1f} ms" for form, s in times.items())
            for layout, times in report["lrn_s"].items()
        ),
        *harness.ratio_lines(report["ratios"], digits=3),
        *report["notes"],
    ]


def choice_lines(rates: Sequence[dict[str, Any]]) -> list[str]:
    """Return a line for each step that runs, and why, with the subjects that run by it."""
    subjects: dict[str, list[str]] = {}
    for rate in rates:
        if rate["step"] is not None:
            subjects.setdefault(f"{rate['step']} ({rate['why']})", []).append(str(rate["subject"]))
    return [f"{', '.join(names)}: {choice}" for choice, names in subjects.items()]
