"""What the commands that serve do, put together from the parts. Imports neither torch nor train."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Literal

import msgspec

from data_pipeline.console import show_progress
from data_pipeline.errors import UserError
from data_pipeline.faults import visible
from data_pipeline.index import find_images
from data_pipeline.layouts import open_dataset
from infer.backends import BackendName, DeviceName, choose_backend
from infer.bundle import Bundle, Limits, Proof, find_bundle, load_bundle
from infer.evaluate import Evaluation, evaluate_bundle
from infer.predict import DEFAULT_TOP, Row, predict
from infer.report import RowCounter, Summary, write_jsonl, write_table

log = logging.getLogger("infer")

TABLE_FILE_WIDTH = 120
"""Columns of a table that goes to a file or a pipe."""


def predict_images(
    paths: Iterable[Path],
    *,
    model: Path | None,
    backend: BackendName,
    device: DeviceName,
    top: int | None,
    batch_size: int,
    format: Literal["table", "jsonl"],
    output: Path | None,
) -> Summary:
    """Predict files and folders, and write a row for each, in order, as batches finish.

    Args:
        paths: image files, and folders that are searched with all below them.
        model: a bundle; None for the newest export, which is named on stderr.
        backend, device: see `infer.backends.choose_backend`.
        top: classes a row; None for five, or all where the model has fewer.
        batch_size: images a batch.
        format: how rows are written.
        output: the file to write; None for stdout.
    Returns:
        Counts, and what really ran; also said on stderr.
    Raises:
        UserError: no images, no model, or a backend or device that cannot be had.
        CorruptFileError: a bundle that was changed.
    """
    files = find_images(paths)
    bundle = load_bundle(find_bundle(model))
    choice = choose_backend(bundle, backend=backend, device=device)
    with closing(choice.backend):
        log.info(f"model: {bundle.folder}")
        log.info(f"runs on: {choice.sentence}")
        counter = RowCounter(choice.backend)
        rows = counter.count(predict(files, bundle, choice.backend, top=top, batch_size=batch_size))
        # Rows that a person sees as they come are progress enough; a bar would be drawn into them.
        shown = output is not None or not sys.stdout.isatty()
        _write(_with_progress(rows, len(files), shown), format, output, bundle, top)
        summary = counter.summary()
    log.info(summary.sentence())
    return summary


def evaluate_exported(
    path: Path, data: Path | None, *, split: str, device: DeviceName, ten_crop: bool = False
) -> Evaluation:
    """Loss, top-1 and top-5 of a bundle.

    Args:
        path: the bundle.
        data: folder with the split; None for the data of the run that the bundle lies in.
        split: which folder of the data.
        device: see `infer.backends.choose_backend`.
        ten_crop: see `evaluate_bundle`.
    Raises:
        UserError: no data, or other classes than the bundle's.
    """
    bundle = load_bundle(find_bundle(path))
    root = data or _data_of_run(bundle)
    dataset = open_dataset(root, split)
    choice = choose_backend(bundle, device=device)
    with closing(choice.backend):
        log.info(f"runs on: {choice.sentence}")
        return evaluate_bundle(bundle, choice.backend, dataset, ten_crop=ten_crop)


def describe_export(bundle: Bundle) -> list[str]:
    """Lines that say what was exported, where it loads, and how the gate judged it."""
    manifest = bundle.manifest
    files = ", ".join(f"{name} {entry.size_bytes / 1e6:.1f} MB" for name, entry in manifest.files.items())
    lines = [
        f"exported {bundle.folder}",
        f"  files: {files}",
        f"  {manifest.precision}, batches of 1 to {manifest.max_batch}, {len(manifest.classes)} classes",
    ]
    if manifest.engine is not None:
        engine = manifest.engine
        lines.append(
            f"  engine: {engine.library} {engine.version}, loads on GPUs of {', '.join(engine.gpus)}"
        )
    if manifest.proof is not None:
        lines.append(f"  precision, read from model.onnx: {_words(manifest.proof)}")
    if manifest.calibration is not None:
        by = manifest.calibration
        lines.append(f"  calibrated on {by.num_images} images of {by.data}/{by.split} ({by.method})")
    gate = manifest.report
    if gate is not None:
        lines.append(
            f"  gate: {gate.num_images} of {gate.num_available} images of {gate.data}/{gate.split}, "
            f"checkpoint accuracy {gate.checkpoint_accuracy:.2%}"
        )
        judged = [("ONNX", gate.onnx), *([("engine", gate.engine)] if gate.engine is not None else [])]
        lines += [
            f"  {name}: top-1 agreement {found.top1_agreement:.2%}, top-5 {found.top5_agreement:.2%}, "
            f"largest probability difference {found.max_probability_difference:.1e} "
            f"({_limit(gate.limits)}), accuracy {found.accuracy:.2%}"
            for name, found in judged
        ]
        if gate.engine_not_run is not None:
            lines.append(f"  engine not run here: {gate.engine_not_run}")
    return lines


def _words(proof: Proof) -> str:
    """`Conv float16, Gemm float16, LRN float; 0 Q and 0 DQ nodes`."""
    kinds = ", ".join(f"{name} {'/'.join(types)}" for name, types in proof.computed_in.items())
    return f"{kinds}; {proof.num_quantize} Q and {proof.num_dequantize} DQ nodes"


def _limit(limits: Limits) -> str:
    most = limits.max_probability_difference
    return "no limit" if most is None else f"limit {most:.0e}"


def _data_of_run(bundle: Bundle) -> Path:
    """The data folder of the run that a bundle lies in; a bundle itself holds no paths."""
    config = bundle.folder.parent.parent / "config.json"
    try:
        root = msgspec.json.decode(config.read_bytes(), type=_RunConfig).data.root
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        root = None
    if root is None:
        raise UserError(f"{bundle.folder} does not lie in a run that names its data: use --data DIR")
    return Path(root)


class _RunData(msgspec.Struct):
    root: str | None = None


class _RunConfig(msgspec.Struct):
    """What is wanted of a run's `config.json`."""

    data: _RunData


def _with_progress(rows: Iterable[Row], total: int, shown: bool) -> Iterator[Row]:
    with show_progress("predict", total, shown=shown) as progress:
        for row in rows:
            yield row
            progress.advance(1)


def _write(rows: Iterable[Row], format: str, output: Path | None, bundle: Bundle, top: int | None) -> None:
    if format == "jsonl":
        if output is None:
            write_jsonl(rows, sys.stdout.buffer)
        else:
            with output.open("wb") as file:
                write_jsonl(rows, file)
        return
    from rich.cells import cell_len
    from rich.console import Console

    labels = bundle.manifest.class_labels
    places, cells = top or min(DEFAULT_TOP, len(labels)), max(cell_len(visible(c)) for c in labels)
    if output is None:
        terminal = sys.stdout.isatty()
        write_table(
            rows, Console(width=None if terminal else TABLE_FILE_WIDTH), top=places, label_cells=cells
        )
    else:
        with output.open("w", encoding="utf-8") as file:
            write_table(rows, Console(file=file, width=TABLE_FILE_WIDTH), top=places, label_cells=cells)
