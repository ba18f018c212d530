"""`alexnet bench train`: images/s of training, as a fraction of this machine's arithmetic, and torchvision's.

Fractions of the peak (MFU) compare the best round with the best matrix product of all rounds.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

from data_pipeline.common.errors import UserError
from train.bench import harness
from train.bench.figures import FIGURES, PHASES, Measured, make_ratios, make_row
from train.bench.flops import flops_of, gemm_gflops
from train.bench.harness import Case, CaseError, Report, four_digits, log
from train.bench.images import write_bench_images
from train.bench.lrn import LrnCase
from train.bench.steps import open_steps
from train.bench.subjects import DEFAULT, NETWORKS, PrecisionName, StepSpec, make_specs
from train.distributed.numerics import exact_float32
from train.distributed.world import choose_device, cpu_share
from train.optim.precision import choose_precision

LIMIT_S: dict[str, float | None] = {"cpu": None, "cuda": 60}
"""What one subject may take, building and compiling included: more is cut off, and said."""
OUR_BUILD_LIMIT_S: dict[str, float | None] = {"cpu": None, "cuda": 180}
"""What building one of ours may take, beside that: on a new machine its step is proved first."""
BATCHES = {"cpu": (128,), "cuda": (128, 1024)}
STEPS = {"cpu": (2, 0), "cuda": (40, 10)}
"""Timed in each round, and run before them."""
FED_STEPS = {"cpu": 4, "cuda": 40}
K = TypeVar("K", StepSpec, str)


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
    measured: Measured, specs: Sequence[StepSpec], fed: Container[StepSpec], num_rounds: int, folder: Path,
    device: Literal["cpu", "cuda"],
) -> None:  # fmt: skip
    """Measure the cases of one batch size, in turns: their steps, beside the loader, and what they launch."""
    with ExitStack() as stack:
        start = partial(Case, stack, open_steps, limit_s=LIMIT_S[device], build=False)
        cases = {
            spec: start(spec, measured.crop_px, folder, device, build_limit_s=build_limit_s(spec, device))
            for spec in specs
        }
        for spec, case in list(cases.items()):
            log.info(f"starting {spec}")
            with going_on(measured, cases, spec):
                case.build()
                note_choice(measured, spec, case)
        for _ in harness.rounds(num_rounds):
            measure_steps(measured, cases, device)
        for spec, case in list(cases.items()):
            with going_on(measured, cases, spec):
                measured.figures[spec] |= case.request("start_and_memory")
                measured.figures[spec]["gflop_per_image"] = flops_of(spec, measured.crop_px) / 1e9
        fed_cases = {spec: case for spec, case in cases.items() if spec in fed}
        for _ in harness.rounds(num_rounds if fed_cases else 0, "fed by the loader, "):
            measure_fed(measured, fed_cases, device)
        for spec, case in list(cases.items()):
            if spec not in measured.failures:
                with going_on(measured, cases, spec):
                    measured.figures[spec] |= case.request("profile")


def build_limit_s(spec: StepSpec, device: str) -> float | None:
    """Return the seconds that building a case may take by itself; None where they count among all."""
    return None if spec.network == "torchvision" else OUR_BUILD_LIMIT_S[device]


def note_choice(measured: Measured, spec: StepSpec, case: Case) -> None:
    """Note which step of the trainer's a case runs."""
    if (choice := case.request("choice")) is not None:
        measured.figures[spec]["choice_s"] = choice.pop("choice_s")
        measured.choices[spec] = choice


def measure_steps(measured: Measured, cases: dict[StepSpec, Case], device: str) -> None:
    """Measure a round of matrix products, and of every case's steps."""
    for precision in dict.fromkeys(spec.precision or "fp32" for spec in cases):
        fastest = gemm_gflops(precision, device)
        measured.gemm_gflops[precision] = max(measured.gemm_gflops.get(precision, 0), fastest)
    for spec, case in list(cases.items()):
        with going_on(measured, cases, spec, "step"):
            measured.seconds[spec, "step"].append(case.request("step_s", *STEPS[device]))


@contextmanager
def going_on(measured: Measured, cases: dict[K, Case], key: K, *phases: str) -> Iterator[None]:
    """Leave out a case that fails or whose time is over, and these phases of it; the others go on."""
    try:
        yield
    except CaseError as error:
        cases.pop(key, None)
        measured.failures[key] = str(error).removeprefix(f"{key}: ")
        for phase in phases:
            measured.seconds.pop((key, phase), None)  # type: ignore[arg-type]
        log.warning(str(error))


def measure_lrn(measured: Measured, num_rounds: int, batch: int, device: Literal["cpu", "cuda"]) -> None:
    """Measure the first LRN of `paper` by itself; the best times are kept."""
    side = (measured.crop_px + 4 - 11) // 4 + 1
    with ExitStack() as stack, going_on(measured, {}, "lrn"):
        case = Case(stack, LrnCase, batch, side, device, limit_s=LIMIT_S[device])
        for _ in harness.rounds(num_rounds, "LRN alone, "):
            for layout, found in case.request("measure").items():
                best = measured.lrn_s.setdefault(layout, {})
                for form, seconds in found.items():
                    best[form] = min(best.get(form, seconds), seconds)


def measure_fed(measured: Measured, cases: dict[StepSpec, Case], device: str) -> None:
    """Measure a round of the step, the loader and both together, in the same minutes."""
    for spec, case in list(cases.items()):
        with going_on(measured, cases, spec, "fed_step", "loader", "end_to_end"):
            measured.seconds[spec, "fed_step"].append(case.request("step_s", FED_STEPS[device]))
            for phase in ("loader", "end_to_end"):
                rate = case.request("fed_images_per_s", FED_STEPS[device], phase == "end_to_end")
                measured.seconds[spec, phase].append(spec.batch / rate)


def describe(report: Report) -> list[str]:
    """Return the peaks, a table row for each case, the ratios and the notes."""
    rows = []
    for rate in report["rates"]:
        cells: list[object] = [str(rate["subject"]), rate["step"]]
        for phase in map(rate["phases"].get, PHASES):
            mfu = "" if phase is None or phase["mfu"] is None else f" ({phase['mfu']:.2f})"
            cells.append(None if phase is None else f"{phase['images_per_s']:.1f}{mfu}")
        rows.append([*cells, *(rate[name] for name in FIGURES), rate["failure"] or ""])
    columns = [
        ("images/s (MFU)", "<34"),
        ("by", "<24"),
        *((phase, ">16") for phase in PHASES),
        *FIGURES.values(),
        ("", ""),
    ]
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
