"""Export from end to end: checkpoint, ONNX, engine, gate, bundle. What the gate refuses is not shipped."""

from __future__ import annotations

import importlib.metadata
import logging
import math
import platform
import shutil
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from data_pipeline.common.errors import UserError
from data_pipeline.common.text import printable
from data_pipeline.datasets.dataset import Dataset
from data_pipeline.loader import Loader
from infer.bundle.load import Bundle
from infer.bundle.manifest import (
    CPU_NAME,
    ENGINE_NAME,
    ONNX_NAME,
    SCHEMA_VERSION,
    Calibration,
    CpuModel,
    Format,
    Manifest,
    Origin,
    Precision,
    image_input,
    now_utc,
    probability_output,
)
from infer.bundle.write import measure_files, staging_folder, write_bundle
from infer.export.compare import spread
from infer.export.cpu_form import has_shared_weights, write_cpu_graph
from infer.export.engine_options import DEFAULT_MAX_BATCH, EngineOptions, check_max_batch, profile_batches
from infer.export.gate import run_gate
from infer.export.quantize import quantize_onnx
from infer.export.quantize_cpu import quantize_for_cpu
from infer.export.to_onnx import export_onnx
from infer.export.to_tensorrt import build_engine
from infer.export.verify_precision import check_plan_size, prove_precision
from infer.predict.decode import open_decoder, valid_images
from infer.runtime.choose import tensorrt_versions
from train.checkpoints.load import Checkpoint, load_checkpoint
from train.evaluate import load_split

log = logging.getLogger("infer")

CALIBRATION_IMAGES = 256
CALIBRATION_BATCH = 16
_USED_TO_BUILD = ("alexnet", "torch", "onnx", "onnxscript", "onnxruntime-gpu", "numpy", "pillow")


def export_models(
    checkpoint_folder: Path,
    formats: tuple[Format, ...],
    *,
    data: Path | None = None,
    out: Path | None = None,
    max_batch: int = DEFAULT_MAX_BATCH,
    precision: Precision = "fp32",
    calibrate: Path | None = None,
    options: EngineOptions | None = None,
) -> dict[Format, Bundle]:
    """Export a checkpoint in one format or in both, each as a bundle that agrees with it.

    Of two bundles the second has the first one's ONNX file, byte for byte, and its verdict.

    Args:
        checkpoint_folder: a step's folder, as `train.checkpoints.load.find_checkpoint` gives it.
        formats: `onnx`, and `trt` for an engine with the ONNX file that it was built from beside it.
        data: folder with the `val/` images of the gate; None for the data that the run was trained on.
        out: the bundle's folder, or of two formats the folder of both; None for the run's `export/`. An
            earlier export there is replaced, once the new one has passed the gate.
        max_batch: largest batch that the model takes, 1..4096.
        precision: of the weights and the arithmetic; LRN and softmax are computed in float32 in each.
        calibrate: for int8, folder with the `train/` images that set the ranges; None for the data that the
            run was trained on.
        options: how a TensorRT engine is built.
    Returns:
        The bundles by format, verified on the disk.
    Raises:
        UserError: no validation images, no TensorRT, an `out` that is not ours to replace.
        CorruptFileError: a damaged checkpoint.
        BuildError: TensorRT refused the model.
        GateError: the export does not agree with the checkpoint.
    """
    check_max_batch(max_batch)
    if calibrate is not None and precision != "int8":
        raise UserError(f"--calibrate is for --precision int8; {precision} needs no calibration")
    options = options or EngineOptions()
    if "trt" in formats:
        profile_batches(max_batch, options.tuned_batch)
    elif asked := options.asked():
        raise UserError(f"{asked} is for --format trt: an ONNX file runs on any GPU")
    checkpoint = load_checkpoint(checkpoint_folder)
    if checkpoint.average_state:
        log.info(f"exporting {checkpoint.description}")
    dataset = load_split(checkpoint, data, "val")
    export = _Export(checkpoint, dataset, max_batch, precision, calibrate, options)
    root = out or checkpoint.run_folder / "export"
    bundles: dict[Format, Bundle] = {}
    for format in sorted(formats):  # ONNX first: an engine is built from it
        one_place = out is not None and len(formats) == 1
        target = root if one_place else root / f"{format}-{precision}"
        bundles[format] = export.write(format, target, bundles.get("onnx"))
    return {format: bundles[format] for format in formats}


def export_model(
    checkpoint_folder: Path,
    format: Format,
    *,
    data: Path | None = None,
    out: Path | None = None,
    max_batch: int = DEFAULT_MAX_BATCH,
    precision: Precision = "fp32",
    calibrate: Path | None = None,
    options: EngineOptions | None = None,
) -> Bundle:
    """Export a checkpoint in one format: see `export_models`."""
    return export_models(
        checkpoint_folder,
        (format,),
        data=data,
        out=out,
        max_batch=max_batch,
        precision=precision,
        calibrate=calibrate,
        options=options,
    )[format]


@dataclass(frozen=True)
class _Export:
    """One checkpoint on its way into bundles."""

    checkpoint: Checkpoint
    dataset: Dataset
    max_batch: int
    precision: Precision
    calibrate: Path | None
    options: EngineOptions

    def write(self, format: Format, target: Path, given: Bundle | None) -> Bundle:
        """Write one bundle.

        Args:
            format: which.
            target: its folder.
            given: the bundle of format `onnx` of this export, if there is one: its ONNX file is taken.
        """
        checkpoint, precision = self.checkpoint, self.precision
        crop_px = checkpoint.preprocessing.crop_px
        with staging_folder(target) as staging:
            onnx_path, engine_path = staging / ONNX_NAME, staging / ENGINE_NAME
            if given is None:
                calibration = _write_onnx(checkpoint, staging, precision, self.calibrate)
            else:
                for name in {given.onnx_path.name, given.cpu_path.name}:
                    shutil.copyfile(given.folder / name, staging / name)
                calibration = given.manifest.calibration
            proof = prove_precision(onnx_path, precision)
            cpu = _describe_cpu(staging / CPU_NAME, precision)
            engine = None
            if format == "trt":
                engine = build_engine(
                    onnx_path,
                    engine_path,
                    checkpoint_sha256=checkpoint.sha256,
                    crop_px=crop_px,
                    max_batch=self.max_batch,
                    precision=precision,
                    options=self.options,
                )
                check_plan_size(engine_path, proof, precision)
            draft = Manifest(
                schema_version=SCHEMA_VERSION,
                created=now_utc(),
                format=format,
                precision=precision,
                max_batch=self.max_batch,
                classes=tuple(map(printable, checkpoint.classes)),
                labels_text=tuple(map(printable, checkpoint.labels_text)),
                preprocessing=checkpoint.preprocessing,
                inputs=(image_input(crop_px),),
                outputs=(probability_output(len(checkpoint.classes)),),
                files=measure_files(staging, sorted(path.name for path in staging.iterdir())),
                checkpoint=make_origin(checkpoint),
                versions=_versions(),
                engine=engine,
                calibration=calibration,
                proof=proof,
                cpu=cpu,
            )
            proven = None
            same = ONNX_NAME, CPU_NAME
            if given is not None and all(
                draft.files.get(name) == given.manifest.files.get(name) for name in same
            ):
                proven = given.manifest.report
            report = run_gate(Bundle(staging, draft), checkpoint, self.dataset, proven)
            return write_bundle(staging, target, replace(draft, report=report))


def _describe_cpu(path: Path, precision: Precision) -> CpuModel | None:
    """What the form for a CPU is, if there is one."""
    if not path.exists():
        return None
    reads = ONNX_NAME if has_shared_weights(path) else ""
    return CpuModel(file=path.name, reads=reads, proof=prove_precision(path, precision))


def _write_onnx(
    checkpoint: Checkpoint, folder: Path, precision: Precision, calibrate: Path | None
) -> Calibration | None:
    """Write the model in its precision, and its form for a CPU; say what int8 was calibrated on."""
    path = folder / ONNX_NAME
    if precision != "int8":
        export_onnx(checkpoint, path, precision=precision)
        write_cpu_graph(path, folder / CPU_NAME)
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
                Loader(decoder, checkpoint.preprocessing).eval(sample, micro_batch=CALIBRATION_BATCH)
            ) as batches,
        ):
            for batch in batches:
                if batch.valid.any():
                    num_images += int(batch.valid.sum())
                    yield valid_images(batch)

    source = path.with_name("float32.onnx")
    export_onnx(checkpoint, source)
    batches = list(images())
    try:
        quantize_onnx(source, path, batches)
        quantize_for_cpu(source, folder / CPU_NAME, batches)
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
