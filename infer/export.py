"""Export from end to end: checkpoint, ONNX, engine, gate, bundle. What the gate refuses is not shipped."""

from __future__ import annotations

import importlib.metadata
import logging
import math
import platform
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import get_args

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from data_pipeline.errors import UserError
from data_pipeline.faults import printable
from data_pipeline.loader import eval_batches
from infer.backends import tensorrt_versions
from infer.build_tensorrt import build_engine
from infer.bundle import (
    ENGINE_NAME,
    ONNX_NAME,
    SCHEMA_VERSION,
    Bundle,
    Calibration,
    Format,
    Manifest,
    Origin,
    Precision,
    image_input,
    now_utc,
    probability_output,
)
from infer.bundle_writer import measure_files, staging_folder, write_bundle
from infer.export_onnx import export_onnx
from infer.gate import run_gate, spread
from infer.images import open_decoder, valid_images
from infer.precision_proof import check_plan_size, prove_precision
from infer.quantize import quantize_onnx
from train.checkpoint import Checkpoint, load_checkpoint
from train.evaluate import load_split

log = logging.getLogger("infer")

DEFAULT_MAX_BATCH = 64
CALIBRATION_IMAGES = 256
CALIBRATION_BATCH = 16
_USED_TO_BUILD = ("alexnet", "torch", "onnx", "onnxscript", "onnxruntime-gpu", "numpy", "pillow")


def parse_formats(text: str) -> tuple[Format, ...]:
    """The formats of `--format`, in the order given.

    Raises:
        UserError: anything but onnx, trt, or both.

    >>> parse_formats("onnx,trt")
    ('onnx', 'trt')
    """
    names = tuple(text.split(","))
    formats = tuple(known for name in names for known in get_args(Format) if name == known)
    if len(formats) != len(names) or len(set(names)) != len(names):
        raise UserError(f"--format {text}: onnx, trt, or onnx,trt")
    return formats


def export_model(
    checkpoint_folder: Path,
    format: Format,
    *,
    data: Path | None = None,
    out: Path | None = None,
    max_batch: int = DEFAULT_MAX_BATCH,
    precision: Precision = "fp32",
    calibrate: Path | None = None,
    gpus: tuple[str, ...] = (),
) -> Bundle:
    """Export a checkpoint as a bundle that agrees with it.

    Args:
        checkpoint_folder: a step's folder, as `train.checkpoint.find_checkpoint` gives it.
        format: `onnx`, or `trt` for an engine with the ONNX file that it was built from beside it.
        data: folder with the `val/` images of the gate; None for the data that the run was trained on.
        out: the bundle's folder; None for `<run>/export/<format>-<precision>`. An earlier export there is
            replaced, once the new one has passed the gate.
        max_batch: largest batch that the model takes, 1..4096.
        precision: of the weights and the arithmetic; LRN and softmax are computed in float32 in each.
        calibrate: for int8, folder with the `train/` images that set the ranges; None for the data that the
            run was trained on.
        gpus: architectures that a TensorRT engine is built for, as `sm89`; none for all that the library
            offers.
    Returns:
        The bundle, verified on the disk.
    Raises:
        UserError: no validation images, no TensorRT, an `out` that is not ours to replace.
        CorruptFileError: a damaged checkpoint.
        BuildError: TensorRT refused the model.
        GateError: the export does not agree with the checkpoint.
    """
    if not 1 <= max_batch <= 4096:
        raise UserError(f"--max-batch {max_batch}: a number from 1 to 4096")
    if calibrate is not None and precision != "int8":
        raise UserError(f"--calibrate is for --precision int8; {precision} needs no calibration")
    if gpus and format != "trt":
        raise UserError("--gpu is for --format trt: an ONNX file runs on any GPU")
    checkpoint = load_checkpoint(checkpoint_folder)
    if checkpoint.average_state:
        log.info(f"exporting {checkpoint.description}")
    dataset = load_split(checkpoint, data, "val")
    target = out or checkpoint.run_folder / "export" / f"{format}-{precision}"
    crop_px = checkpoint.preprocessing.crop_px
    with staging_folder(target) as staging:
        calibration = _write_onnx(checkpoint, staging / ONNX_NAME, precision, calibrate)
        proof = prove_precision(staging / ONNX_NAME, precision)
        engine = None
        if format == "trt":
            engine = build_engine(
                staging / ONNX_NAME,
                staging / ENGINE_NAME,
                checkpoint_sha256=checkpoint.sha256,
                crop_px=crop_px,
                max_batch=max_batch,
                precision=precision,
                gpus=gpus,
            )
            check_plan_size(staging / ENGINE_NAME, proof, precision)
        draft = Manifest(
            schema_version=SCHEMA_VERSION,
            created=now_utc(),
            format=format,
            precision=precision,
            max_batch=max_batch,
            classes=tuple(map(printable, checkpoint.classes)),
            labels_text=tuple(map(printable, checkpoint.labels_text)),
            preprocessing=checkpoint.preprocessing,
            inputs=(image_input(crop_px),),
            outputs=(probability_output(len(checkpoint.classes)),),
            files=measure_files(staging, (ONNX_NAME, ENGINE_NAME) if engine else (ONNX_NAME,)),
            checkpoint=make_origin(checkpoint),
            versions=_versions(),
            engine=engine,
            calibration=calibration,
            proof=proof,
        )
        report = run_gate(Bundle(staging, draft), checkpoint, dataset)
        return write_bundle(staging, target, replace(draft, report=report))


def _write_onnx(
    checkpoint: Checkpoint, path: Path, precision: Precision, calibrate: Path | None
) -> Calibration | None:
    """Write the model in its precision; say what int8 was calibrated on."""
    if precision != "int8":
        export_onnx(checkpoint, path, precision=precision)
        return None
    whole = load_split(checkpoint, calibrate, "train")
    sample = spread(whole, CALIBRATION_IMAGES)
    log.info("int8: calibrating on %d training images of %s", len(sample), printable(whole.root))
    num_images = 0

    def images() -> Iterator[NDArray[np.uint8]]:
        nonlocal num_images
        with (
            open_decoder(checkpoint.preprocessing, CALIBRATION_BATCH) as decoder,
            closing(
                eval_batches(sample, decoder, checkpoint.preprocessing, micro_batch=CALIBRATION_BATCH)
            ) as batches,
        ):
            for batch in batches:
                if batch.valid.any():
                    num_images += int(batch.valid.sum())
                    yield valid_images(batch)

    source = path.with_name("float32.onnx")
    export_onnx(checkpoint, source)
    try:
        quantize_onnx(source, path, images())
    finally:
        source.unlink()
    return Calibration(
        data=printable(whole.root.resolve().name), split=whole.split, num_images=num_images, method="minmax"
    )


def make_origin(checkpoint: Checkpoint) -> Origin:
    """What a bundle says of the checkpoint that it was made of."""
    return Origin(
        sha256=checkpoint.sha256,
        step=checkpoint.step,
        epoch=checkpoint.epoch,
        recipe=checkpoint.config.recipe,
        model=checkpoint.config.model.name,
        weights=checkpoint.weights_name,
        metrics={name: value for name, value in checkpoint.metrics.items() if math.isfinite(value)},
    )


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), **tensorrt_versions()}
    for name in _USED_TO_BUILD:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
