"""`alexnet bench infer`: how fast files become rows, phase by phase and against a plain loop; the first row.

Everything is measured in one run and in turns. A phase is measured alone, on all cores. Decoding and model
share the cores when they run together, so that no arrangement of the two can be faster than one after the
other: the bound is 1 / (1/decode + 1/model) images a second. On a GPU they do not share, and the bound is the
slower of the two.
"""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from infer.bench.bundle import make_bench_checkpoint, make_bench_data
from infer.bench.subjects import PHASES
from infer.bundle.gate_report import Agreement
from infer.bundle.load import Bundle
from infer.bundle.schema import Precision
from infer.export.pipeline import export_models
from train.bench.turns import Ask, four_digits, open_subject

FIRST_BATCH = 32
"""The promised ratios are for this one."""
MAX_BATCH = 256


class InferRate(msgspec.Struct, frozen=True, kw_only=True):
    """One model in one precision at one batch size.

    Args:
        provider, device, precision: who really computed.
        images_per_s: of each phase alone, and of the whole: medians. `decode` is from files to what the model
            takes, of which `preprocess` (resize and crop) is a part; `copy` hands it over; `post` makes rows.
        model_ms, one_batch_ms: median and 99th percentile for one batch: the model alone; from files to rows.
        accuracy: on the photographs.
        top1_agreement: how often it says what the checkpoint says.
    """

    model: str
    batch: int
    provider: str
    device: str
    precision: str
    images_per_s: dict[str, float]
    model_ms: tuple[float, float]
    one_batch_ms: tuple[float, float]
    accuracy: float
    top1_agreement: float


class InferReport(msgspec.Struct, frozen=True, kw_only=True):
    """What `bench_infer` measured.

    Args:
        plain_images_per_s: of the plain loop, by model and batch size.
        seconds: of processes from start to end: `help`, `import_click`, `first_row`, `session`.
        ratios: by name; None where it was not measured, and `notes` says why.
    """

    machine: str
    num_images: int
    rates: list[InferRate]
    plain_images_per_s: dict[str, dict[int, float]]
    seconds: dict[str, float]
    ratios: dict[str, float | None]
    notes: list[str]


Key = tuple[str, str, int, str]
"""Model, precision or `plain`, batch size, phase."""


def bench_infer(
    folder: Path | None = None,
    *,
    models: Sequence[str] = ("owt", "paper"),
    precisions: Sequence[Precision] = ("fp32", "int8"),
    batches: Sequence[int] = (1, 8, FIRST_BATCH, 128, MAX_BATCH),
    num_images: int = 1000,
    rounds: int = 5,
    round_images: int = 512,
    device: str = "cpu",
    overrides: Sequence[str] = (),
    tell: Callable[[str], None] = lambda text: None,
) -> InferReport:
    """Measure prediction.

    Args:
        folder: where the photographs are kept; None for a folder among the temporary files.
        models: networks, of 1000 classes at 224 pixels.
        precisions: the ratios compare int8 with fp32.
        batches: sizes; the promised ratios are for 32.
        num_images: how many photographs.
        rounds: turns at a batch of 32; the other sizes have one.
        round_images: that each phase takes in a turn; the plain loop a quarter of them.
        device: where the models run.
        overrides: keys of the recipes, `dotted.key=value`.
        tell: called with a line on what is being done.
    Raises:
        GateError: an export does not agree with its checkpoint.
    """
    data = make_bench_data(folder, num_images)
    seconds: dict[Key, list[float]] = {}
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="alexnet-bench-")))
        bundles: dict[tuple[str, Precision], Bundle] = {}
        ask: dict[tuple[str, str], Ask] = {}
        for model in models:
            tell(f"{model}: a checkpoint, and its exports")
            checkpoint = make_bench_checkpoint(model, data, work / model, overrides)
            for precision in precisions:
                out = work / model / precision
                bundles[model, precision] = export_models(
                    checkpoint, ("onnx",), data=data, out=out, max_batch=MAX_BATCH, precision=precision
                )["onnx"]
                ask[model, precision] = _open(stack, "ours", out, data, device)
            ask[model, "plain"] = _open(stack, "plain", checkpoint, data, device)
        about = {key: one("about") for key, one in ask.items()}
        for batch in batches:
            for number in range(rounds if batch == FIRST_BATCH else 1):
                tell(f"batches of {batch}, round {number + 1}")
                _measure_round(ask, batch, round_images, seconds)
        tell("the first row, and --help")
        processes = _measure_processes(bundles[models[-1], precisions[0]], data, rounds)
    rates = [
        _rate(
            model,
            precision,
            batch,
            about[model, precision],
            _verdict(bundles[model, precision], device),
            seconds,
        )
        for model in models
        for precision in precisions
        for batch in batches
    ]
    ratios, notes = _ratios(models, precisions, batches, device, seconds, processes)
    return InferReport(
        machine=f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores",
        num_images=num_images,
        rates=rates,
        plain_images_per_s={
            model: {
                batch: four_digits(_speed(seconds, (model, "plain", batch, "end_to_end")))
                for batch in batches
            }
            for model in models
        },
        seconds={name: four_digits(statistics.median(values)) for name, values in processes.items()},
        ratios=ratios,
        notes=notes,
    )


def _open(stack: ExitStack, kind: str, folder: Path, data: Path, device: str) -> Ask:
    return stack.enter_context(
        open_subject("infer.bench.subjects", [kind, str(folder), str(data / "val"), device])
    )


def _measure_round(
    ask: dict[tuple[str, str], Ask], batch: int, round_images: int, seconds: dict[Key, list[float]]
) -> None:
    """Each subject once; a phase's seconds are for one batch."""
    for phase in PHASES:
        for (model, precision), one in ask.items():
            if precision == "plain" and phase != "end_to_end":
                continue
            images = round_images // 4 if precision == "plain" else round_images
            count = max(2, images // batch)
            # Of single batches a few more, for a 99th percentile, and not as many as of the smallest.
            times = one(phase, batch, min(count, 32) if phase == "one_batch" else count)
            if precision != "plain" and phase in ("decode", "end_to_end"):
                times = [times[0] / count]
            seconds.setdefault((model, precision, batch, phase), []).extend(
                [statistics.fmean(times)] if phase == "end_to_end" else times
            )


def _measure_processes(bundle: Bundle, data: Path, rounds: int) -> dict[str, list[float]]:
    """Whole processes, in turns."""
    image = str(next((data / "val").rglob("*.jpg")))
    session = (
        "import onnxruntime as o; s = o.SessionOptions(); s.intra_op_num_threads = "
        f"{len(os.sched_getaffinity(0))}; o.InferenceSession({str(bundle.cpu_path)!r}, s, "
        "providers=['CPUExecutionProvider'])"
    )
    alexnet = [sys.executable, "-m", "alexnet"]
    commands = {
        "help": [*alexnet, "--help"],
        "import_click": [sys.executable, "-c", "import click"],
        "first_row": [*alexnet, "predict", image, "--model", str(bundle.folder), "--format", "jsonl"],
        "session": [sys.executable, "-c", session],
    }
    seconds: dict[str, list[float]] = {}
    for _ in range(max(3, rounds)):
        for name, command in commands.items():
            started = time.perf_counter()
            with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
                assert process.stdout is not None
                if name == "first_row":
                    assert process.stdout.readline().startswith(b'{"path"')
                    seconds.setdefault(name, []).append(time.perf_counter() - started)
                process.communicate()
            if name != "first_row":
                seconds.setdefault(name, []).append(time.perf_counter() - started)
            assert process.returncode == 0, command
    return seconds


def _verdict(bundle: Bundle, device: str) -> Agreement:
    """What the gate found of the file that runs here."""
    report = bundle.manifest.report
    assert report is not None
    return report.cpu if device == "cpu" and report.cpu is not None else report.onnx


def _speed(seconds: dict[Key, list[float]], key: Key) -> float:
    return key[2] / statistics.median(seconds[key])


def _rate(
    model: str, precision: str, batch: int, about: Any, verdict: Agreement, seconds: dict[Key, list[float]]
) -> InferRate:
    def percentiles(phase: str) -> tuple[float, float]:
        middle, high = np.percentile(seconds[model, precision, batch, phase], [50, 99]) * 1e3
        return four_digits(middle), four_digits(high)

    return InferRate(
        model=model,
        batch=batch,
        **about,
        images_per_s={
            phase: four_digits(_speed(seconds, (model, precision, batch, phase)))
            for phase in PHASES
            if phase != "one_batch"
        },
        model_ms=percentiles("model"),
        one_batch_ms=percentiles("one_batch"),
        accuracy=verdict.accuracy,
        top1_agreement=verdict.top1_agreement,
    )


def _ratios(
    models: Sequence[str],
    precisions: Sequence[str],
    batches: Sequence[int],
    device: str,
    seconds: dict[Key, list[float]],
    processes: dict[str, list[float]],
) -> tuple[dict[str, float | None], list[str]]:
    """Each is the worst over the networks, at a batch of 32, the networks' own beside it."""
    bound: dict[str, float] = {}
    plain: dict[str, float] = {}
    int8: dict[str, float] = {}
    never_slower: list[float] = []
    for model in models:
        first = (model, precisions[0])
        if FIRST_BATCH in batches:
            per_s = {p: _speed(seconds, (*first, FIRST_BATCH, p)) for p in ("decode", "model", "end_to_end")}
            together = (
                1 / (1 / per_s["decode"] + 1 / per_s["model"])
                if device == "cpu"
                else min(per_s["decode"], per_s["model"])
            )
            bound[model] = per_s["end_to_end"] / together
            plain[model] = per_s["end_to_end"] / _speed(seconds, (model, "plain", FIRST_BATCH, "end_to_end"))
            if {"fp32", "int8"} <= set(precisions):
                int8[model] = _speed(seconds, (model, "int8", FIRST_BATCH, "model")) / _speed(
                    seconds, (model, "fp32", FIRST_BATCH, "model")
                )
        never_slower += [
            _speed(seconds, (*first, batch, "end_to_end"))
            / _speed(seconds, (model, "plain", batch, "end_to_end"))
            for batch in batches
        ]
    middle = {name: statistics.median(values) for name, values in processes.items()}
    ratios: dict[str, float | None] = {
        "end_to_end_vs_bound": min(bound.values(), default=None),
        "vs_plain_loop": min(plain.values(), default=None),
        "vs_plain_loop_at_its_best_batch": min(never_slower),
        "int8_vs_fp32": min(int8.values(), default=None),
        **{f"int8_vs_fp32_{model}": value for model, value in int8.items()},
        "first_row_vs_session": middle["first_row"] / middle["session"],
        "help_vs_click": middle["help"] / middle["import_click"],
    }
    notes = [f"{name}: not measured" for name, value in ratios.items() if value is None]
    notes.append(
        f"end_to_end_vs_bound, vs_plain_loop, int8_vs_fp32: the worst network, at batches of {FIRST_BATCH}"
    )
    notes.append(
        "vs_plain_loop_at_its_best_batch: the worst of all networks and batch sizes, each at the same size"
    )
    notes.append(
        "the bound: decoding and model, each alone on all cores, one after the other"
        if device == "cpu"
        else "the bound: the slower of decoding and model, each alone"
    )
    return {k: None if v is None else four_digits(v) for k, v in ratios.items()}, notes


def describe(report: InferReport) -> str:
    """The report for people: a row for each model, precision and batch; then the ratios and the notes."""
    shown = [phase for phase in PHASES if phase != "one_batch"]
    lines = [
        f"{report.machine}, {report.num_images} JPEGs of about 500 x 375, 1000 classes at 224 pixels",
        f"{'images/s':<18}" + "".join(f"{phase:>11}" for phase in (*shown, "plain loop"))
        + f"{'model ms':>17}{'files to rows ms':>19}{'accuracy':>10}{'agrees':>8}",
    ]  # fmt: skip
    for rate in report.rates:
        plain = report.plain_images_per_s[rate.model][rate.batch]
        values = [*(rate.images_per_s[phase] for phase in shown), plain]
        lines.append(
            f"{rate.model:<6}{rate.precision:<5}{rate.batch:>6} "
            + "".join(f"{value:>11.0f}" for value in values)
            + f"{rate.model_ms[0]:>9.1f}{rate.model_ms[1]:>8.1f}"
            + f"{rate.one_batch_ms[0]:>11.1f}{rate.one_batch_ms[1]:>8.1f}"
            + f"{rate.accuracy:>10.1%}{rate.top1_agreement:>8.1%}"
        )
    ran = sorted({f"{rate.precision}: {rate.provider} on {rate.device}" for rate in report.rates})
    lines += [*ran, "ms: median and 99th percentile of one batch"]
    lines += [f"{name:<12} {value:.3f} s" for name, value in report.seconds.items()]
    lines += [
        f"{name:<32} " + ("not measured" if ratio is None else f"{ratio:.2f}")
        for name, ratio in report.ratios.items()
    ]
    return "\n".join([*lines, *report.notes])
