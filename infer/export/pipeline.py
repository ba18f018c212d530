"""Export a checkpoint: write ONNX, build the engine, run the gate, write the bundle."""

from __future__ import annotations

import logging
import math
import platform
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from data_pipeline.common.errors import UserError
from data_pipeline.common.machine import installed_version
from data_pipeline.common.text import printable
from data_pipeline.datasets.dataset import Dataset
from data_pipeline.loader import Loader
from data_pipeline.results.card import CARD_NAME, WEIGHTS_NAME
from data_pipeline.transforms.preprocessing import Preprocessing
from infer.bundle.card import bundle_card
from infer.bundle.load import Bundle
from infer.bundle.manifest import SCHEMA_VERSION, Manifest, now_utc
from infer.bundle.schema import (
    CPU_NAME,
    ONNX_NAME,
    Calibration,
    CpuModel,
    Format,
    Origin,
    Precision,
    feature_output,
    image_input,
    probability_output,
)
from infer.bundle.write import copy_files, measure_files, staging_folder, write_bundle
from infer.export.compare import sample_evenly
from infer.export.cpu_form import has_shared_weights
from infer.export.equalize import equalize_ranges
from infer.export.gate import run_gate
from infer.export.options import (
    DEFAULT_MAX_BATCH,
    EngineOptions,
    OnnxOptions,
    check_max_batch,
    profile_batches,
)
from infer.export.quantize import quantize_for_cpu, quantize_for_tensorrt
from infer.export.to_onnx import ContractModel, export_for_cpu, export_for_int8_cpu, export_onnx
from infer.export.to_tensorrt import add_engine
from infer.export.verify_precision import check_precision
from infer.predict.decode import open_decoder, valid_images
from infer.runtime.choose import tensorrt_versions
from train.checkpoints.load import Checkpoint, load_checkpoint
from train.checkpoints.share import encode_weights, without_places
from train.evaluate import load_split
from train.models.alexnet import count_features
from train.runs.card import data_name, training_sections

log = logging.getLogger("infer")

CALIBRATION_IMAGES = 256
CALIBRATION_BATCH = 16
_LIBRARIES = ("alexnet", "torch", "onnx", "onnxscript", "onnxruntime-gpu", "numpy", "pillow")


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
    onnx_options: OnnxOptions | None = None,
    images: Dataset | None = None,
) -> dict[Format, Bundle]:
    """Export a checkpoint in one format or in both, each as a bundle that agrees with it.

    With two formats, both bundles have the same ONNX file, byte for byte, and the same verdict on it.

    Args:
        checkpoint_folder: a step's folder, as `train.checkpoints.load.find_checkpoint` gives it.
        formats: `onnx`; `trt` for an engine, with the ONNX file that it was built from beside it.
        data: folder with the `val/` images of the gate; None for the data that the run was trained on.
        out: the bundle's folder, or with two formats the folder of both; None for the run's `export/`. An
            earlier export there is replaced, once the new one has passed the gate.
        max_batch: largest batch that the model takes, 1..4096.
        precision: of the weights and the arithmetic; LRN and softmax are computed in float32 in each.
        calibrate: for int8, folder with the `train/` images that set the ranges; None for the data that the
            run was trained on.
        options: for the TensorRT engine.
        onnx_options: for the ONNX files.
        images: without labels, for the gate, in place of `data`.
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
    dataset = load_split(checkpoint, data, "val") if images is None else images
    onnx_options = onnx_options or OnnxOptions()
    export = _Export(checkpoint, dataset, max_batch, precision, calibrate, options, onnx_options)
    root = out or checkpoint.run_folder / "export"
    bundles: dict[Format, Bundle] = {}
    for format in sorted(formats):  # ONNX first: an engine is built from it
        one_place = out is not None and len(formats) == 1
        target = root if one_place else root / f"{format}-{precision}"
        bundles[format] = export.write(format, target, bundles.get("onnx"))
    return {format: bundles[format] for format in formats}


@dataclass(frozen=True)
class _Export:
    """The arguments that the bundles of one export share."""

    checkpoint: Checkpoint
    dataset: Dataset
    max_batch: int
    precision: Precision
    calibrate: Path | None
    options: EngineOptions
    onnx_options: OnnxOptions

    def write(self, format: Format, target: Path, onnx_bundle: Bundle | None) -> Bundle:
        """Write one bundle.

        Args:
            format: its format.
            target: its folder.
            onnx_bundle: the bundle of format `onnx` of this export, if there is one: its files are copied,
                and not compared with the checkpoint again.
        """
        with staging_folder(target) as staging:
            if onnx_bundle is None:
                draft, earlier = self._write_onnx(staging), None
            else:
                copy_files(onnx_bundle, onnx_bundle.manifest.files, staging)
                earlier = onnx_bundle.manifest.report
                draft = replace(onnx_bundle.manifest, created=now_utc(), report=None)
            if format == "trt":
                draft = add_engine(staging, draft, self.max_batch, self.options)
            report = run_gate(Bundle(staging, draft), self.checkpoint, self.dataset, earlier)
            manifest = replace(draft, report=report)
            self._write_beside(staging, manifest)
            return write_bundle(staging, target, manifest)

    def _write_beside(self, folder: Path, manifest: Manifest) -> None:
        """Write the card and the weights, which are for people and other programs."""
        checkpoint = self.checkpoint
        config = without_places(checkpoint.config)
        (folder / WEIGHTS_NAME).write_bytes(encode_weights(checkpoint, config))
        card = bundle_card(manifest, data_name(checkpoint.config), training_sections(checkpoint))
        (folder / CARD_NAME).write_text(card, encoding="utf-8")

    def _write_onnx(self, folder: Path) -> Manifest:
        """Write the model and its form for a CPU, check their precision, and describe them."""
        checkpoint, precision = self.checkpoint, self.precision
        opset, layer = self.onnx_options.opset, self.onnx_options.features
        path, cpu_path = folder / ONNX_NAME, folder / CPU_NAME
        model = ContractModel(checkpoint, half=precision == "fp16", features=layer)
        calibration = None
        if precision == "int8":
            calibration = self._write_int8(model, path, cpu_path)
        else:
            export_onnx(model, path, opset=opset)
            weights = None if self.onnx_options.one_file else path
            export_for_cpu(model, cpu_path, weights, opset=opset)
        cpu = None
        if cpu_path.exists():
            reads = ONNX_NAME if has_shared_weights(cpu_path) else ""
            check = check_precision(cpu_path, precision)
            cpu = CpuModel(file=CPU_NAME, reads=reads, precision_check=check)
        outputs = [probability_output(len(checkpoint.classes))]
        if layer is not None:
            outputs.append(feature_output(layer, count_features(model.network, layer)))
        return Manifest(
            schema_version=SCHEMA_VERSION,
            created=now_utc(),
            format="onnx",
            precision=precision,
            max_batch=self.max_batch,
            classes=tuple(map(printable, checkpoint.classes)),
            labels_text=tuple(map(printable, checkpoint.labels_text)),
            preprocessing=checkpoint.preprocessing,
            inputs=(image_input(checkpoint.preprocessing.crop_px),),
            outputs=tuple(outputs),
            files=measure_files(folder, sorted(path.name for path in folder.iterdir())),
            checkpoint=make_origin(checkpoint),
            versions=_versions(),
            calibration=calibration,
            precision_check=check_precision(path, precision),
            cpu=cpu,
        )

    def _write_int8(self, model: ContractModel, path: Path, cpu_path: Path) -> Calibration:
        """Write the model and its form for a CPU in int8, with the ranges of training images."""
        source, opset = path.with_name("float32.onnx"), self.onnx_options.opset
        images = load_split(self.checkpoint, self.calibrate, "train", "--calibrate")
        sample = sample_evenly(images, CALIBRATION_IMAGES)
        log.info("int8: calibrating on %d training images of %s", len(sample), printable(images.root))
        batches = _decode(sample, self.checkpoint.preprocessing)
        equalize_ranges(model.network, model.normalize, batches, model.features)
        export_onnx(model, source, opset=opset)
        quantize_for_tensorrt(source, path, batches)
        lrn_betas = export_for_int8_cpu(model, source, opset=opset)
        quantize_for_cpu(source, cpu_path, batches, lrn_betas)
        source.unlink()
        return Calibration(
            data=printable(images.root.resolve().name),
            split=images.split,
            num_images=sum(map(len, batches)),
            method="minmax",
        )


def _decode(dataset: Dataset, preprocessing: Preprocessing) -> list[NDArray[np.uint8]]:
    """The images of a dataset that can be read, in batches (n, crop, crop, 3)."""
    with open_decoder(preprocessing, CALIBRATION_BATCH) as decoder:
        batches = Loader(decoder, preprocessing).eval(dataset, micro_batch=CALIBRATION_BATCH)
        return [valid_images(batch) for batch in batches if batch.valid.any()]


def make_origin(checkpoint: Checkpoint) -> Origin:
    """Describe the checkpoint for the manifest."""
    return Origin(
        sha256=checkpoint.sha256,
        step=checkpoint.step,
        epoch=checkpoint.epoch,
        recipe=checkpoint.config.recipe,
        model=checkpoint.config.model.description,
        weights=checkpoint.weights_name,
        metrics={name: value for name, value in checkpoint.metrics.items() if math.isfinite(value)},
        init=checkpoint.progress.init,
    )


def _versions() -> dict[str, str]:
    libraries = {name: version for name in _LIBRARIES if (version := installed_version(name))}
    return {"python": platform.python_version(), **tensorrt_versions(), **libraries}
