"""`alexnet bench infer`: files to rows, phase by phase and against a plain loop; the first row's time.

A phase is measured alone, on all cores. Decoding and model share the cores when they run together, so that no
arrangement of the two can be faster than one after the other: the bound is 1 / (1/decode + 1/model) images a
second. On a GPU they do not share, and the bound is the slower of the two.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from data_pipeline.common.machine import usable_cores
from data_pipeline.common.start import own_script
from infer.bench.bundle import make_bench_checkpoint, make_bench_data
from infer.bench.cases import PHASES, BaselineCase, BundleCase
from infer.bundle.load import Bundle
from infer.bundle.schema import Precision
from infer.export.pipeline import export_models
from train.bench import harness
from train.bench.harness import Case, Ratios, Report, four_digits, log

FIRST_BATCH = 32
"""The promised ratios are for this size; the others have one round."""
MAX_BATCH = 256
ROUND_IMAGES = 512
"""Images of a phase in a round; the baseline takes a quarter of them."""
BASELINE = "plain"
SHOWN = [phase for phase in PHASES if phase != "one_batch"]
Key = tuple[str, str, int, str]
"""Model, precision or `plain`, batch size, phase."""
Samples = defaultdict[Key, list[float]]
"""Seconds for one batch: of each batch, or the mean of each round."""


def bench_infer(
    folder: Path | None, *, models: Sequence[str], precisions: Sequence[Precision], batches: Sequence[int],
    num_images: int, num_rounds: int, device: str, round_images: int = ROUND_IMAGES,
    overrides: Sequence[str] = (),
) -> Report:  # fmt: skip
    """Measure prediction; the options are those of the command, and `overrides`, keys of the recipes.

    Raises:
        GateError: an export does not agree with its checkpoint.
    """
    data = make_bench_data(folder, num_images)
    samples: Samples = defaultdict(list)
    bundles: dict[tuple[str, str], Bundle] = {}
    cases: dict[tuple[str, str], Case] = {}
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="alexnet-bench-")))
        for model in models:
            log.info(f"{model}: a checkpoint, and its exports")
            checkpoint = make_bench_checkpoint(model, data, work / model, overrides)
            for precision in precisions:
                bundle = bundles[model, precision] = export_models(
                    checkpoint, ("onnx",), data=data, out=work / model / precision, max_batch=MAX_BATCH,
                    precision=precision,
                )["onnx"]  # fmt: skip
                cases[model, precision] = Case(stack, BundleCase, bundle.folder, data / "val", device)
            cases[model, BASELINE] = Case(stack, BaselineCase, checkpoint, data / "val", device)
        runs_on = {key: case.request("runs_on") for key, case in cases.items()}
        for batch in batches:
            for _ in harness.rounds(num_rounds if batch == FIRST_BATCH else 1, f"batches of {batch}, "):
                measure_round(samples, cases, batch, round_images)
        log.info("the first row, and --help")
        first = bundles[models[-1], precisions[0]]
        processes = measure_processes(first, next((data / "val").rglob("*.jpg")), max(3, num_rounds))
    seconds = {name: statistics.median(values) for name, values in processes.items()}
    speeds = {key: key[2] / statistics.median(values) for key, values in samples.items()}
    ratios, notes = make_ratios(speeds, models, precisions, batches, device, seconds)
    return {
        "machine": harness.machine_name(),
        "num_images": num_images,
        "rates": [
            {"model": key[0], "batch": batch, **runs_on[key],
             "images_per_s": {phase: four_digits(speeds[(*key, batch, phase)]) for phase in SHOWN},
             "model_ms": percentiles_ms(samples[(*key, batch, "model")]),
             "one_batch_ms": percentiles_ms(samples[(*key, batch, "one_batch")]),
             **accuracy_of(bundle, device)}
            for key, bundle in bundles.items() for batch in batches
        ],
        "plain_images_per_s": {
            model: {str(b): four_digits(speeds[model, BASELINE, b, "end_to_end"]) for b in batches}
            for model in models
        },
        "seconds": {name: four_digits(value) for name, value in seconds.items()},
        "ratios": ratios,
        "notes": notes,
    }  # fmt: skip


def measure_round(
    samples: Samples, cases: dict[tuple[str, str], Case], batch: int, round_images: int
) -> None:
    """Measure each phase of each case once; the baseline has one phase."""
    for phase in PHASES:
        for (model, precision), case in cases.items():
            baseline = precision == BASELINE
            if baseline and phase != "end_to_end":
                continue
            count = max(2, (round_images // 4 if baseline else round_images) // batch)
            if phase == "one_batch":  # enough for a 99th percentile
                count = min(count, 32)
            times = case.request("measure", phase, batch, count)
            overlapping = phase in ("decode", "end_to_end")
            samples[model, precision, batch, phase] += [sum(times) / count] if overlapping else times


def measure_processes(bundle: Bundle, image: Path, num_rounds: int) -> dict[str, list[float]]:
    """Return seconds of whole processes; of `first_row`, until the row is there."""
    session = (
        "import onnxruntime as o; s = o.SessionOptions(); s.intra_op_num_threads = "
        f"{usable_cores()}; o.InferenceSession({str(bundle.cpu_path)!r}, s, "
        "providers=['CPUExecutionProvider'])"
    )
    alexnet = own_script("alexnet:main")
    commands = {
        "help": [*alexnet, "--help"],
        "import_click": ["-c", "import click"],
        "first_row": [*alexnet, "predict", str(image), "--model", str(bundle.folder), "--format", "jsonl"],
        "session": ["-c", session],
    }
    seconds: defaultdict[str, list[float]] = defaultdict(list)
    for _ in range(num_rounds):
        for name, arguments in commands.items():
            command = [sys.executable, *arguments]
            started = time.perf_counter()
            with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
                assert process.stdout is not None
                printed = process.stdout.readline() if name == "first_row" else process.stdout.read()
                seconds[name].append(time.perf_counter() - started)
                process.communicate()
            assert process.returncode == 0, command
            assert name != "first_row" or printed.startswith(b'{"path"'), printed
    return seconds


def percentiles_ms(seconds: list[float]) -> list[float]:
    """Return the median and the 99th percentile."""
    return [four_digits(value * 1e3) for value in np.percentile(seconds, [50, 99])]


def accuracy_of(bundle: Bundle, device: str) -> dict[str, float]:
    """Return the gate's figures of the file that runs on this device."""
    report = bundle.manifest.report
    assert report is not None
    agreement = report.cpu if device == "cpu" and report.cpu is not None else report.onnx
    assert agreement.accuracy is not None, "these images have labels"
    return {"accuracy": agreement.accuracy, "top1_agreement": agreement.top1_agreement}


def make_ratios(
    speeds: dict[Key, float], models: Sequence[str], precisions: Sequence[str], batches: Sequence[int],
    device: str, seconds: dict[str, float],
) -> tuple[Ratios, list[str]]:  # fmt: skip
    """Return the ratios, each the worst over the networks, and the notes; int8's also by network."""
    ours = precisions[0]
    measured = models if FIRST_BATCH in batches else ()

    def of_bound(model: str) -> float:
        decode, run, both = (speeds[model, ours, FIRST_BATCH, p] for p in ("decode", "model", "end_to_end"))
        return both / (1 / (1 / decode + 1 / run) if device == "cpu" else min(decode, run))

    def of_baseline(model: str, batch: int) -> float:
        return speeds[model, ours, batch, "end_to_end"] / speeds[model, BASELINE, batch, "end_to_end"]

    int8 = {
        f"int8_vs_fp32_{m}": speeds[m, "int8", FIRST_BATCH, "model"] / speeds[m, "fp32", FIRST_BATCH, "model"]
        for m in (measured if {"fp32", "int8"} <= set(precisions) else ())
    }
    ratios, notes = harness.round_ratios(
        {
            "end_to_end_vs_bound": min((of_bound(model) for model in measured), default=None),
            "vs_plain_loop": min((of_baseline(model, FIRST_BATCH) for model in measured), default=None),
            "vs_plain_loop_at_its_best_batch": min(of_baseline(m, size) for m in models for size in batches),
            "int8_vs_fp32": min(int8.values(), default=None),
            **int8,
            "first_row_vs_session": seconds["first_row"] / seconds["session"],
            "help_vs_click": seconds["help"] / seconds["import_click"],
        }
    )
    bound = "decoding and model, each alone on all cores, one after the other"
    return ratios, [
        *notes,
        f"end_to_end_vs_bound, vs_plain_loop, int8_vs_fp32: the worst network, at batches of {FIRST_BATCH}",
        "vs_plain_loop_at_its_best_batch: the worst of all networks and batch sizes, each at the same size",
        f"the bound: {bound if device == 'cpu' else 'the slower of decoding and model, each alone'}",
    ]


def describe(report: Report) -> list[str]:
    """Return a table row for each model, precision and batch, then the ratios and the notes."""
    columns = [("images/s", "<18"), *((phase, ">11.0f") for phase in SHOWN), ("plain loop", ">11.0f")]
    columns += [("model ms", ">17"), ("files to rows ms", ">19"), ("accuracy", ">10.1%"), ("agrees", ">8.1%")]
    rows = [
        [
            f"{rate['model']:<6}{rate['precision']:<5}{rate['batch']:>6}",
            *rate["images_per_s"].values(),
            report["plain_images_per_s"][rate["model"]][str(rate["batch"])],
            *(f"{middle:.1f}{high:>8.1f}" for middle, high in (rate["model_ms"], rate["one_batch_ms"])),
            rate["accuracy"],
            rate["top1_agreement"],
        ]
        for rate in report["rates"]
    ]
    return [
        f"{report['machine']}, {report['num_images']} JPEGs of about 500 x 375, 1000 classes at 224 pixels",
        *harness.table_lines(columns, rows),
        *sorted({f"{rate['precision']}: {rate['provider']} on {rate['device']}" for rate in report["rates"]}),
        "ms: median and 99th percentile of one batch",
        *(f"{name:<12} {value:.3f} s" for name, value in report["seconds"].items()),
        *harness.ratio_lines(report["ratios"], width=32),
        *report["notes"],
    ]
