"""Runs `alexnet export`: a checkpoint or torchvision's weights become bundles, a bundle an engine.

Imports torch only for a checkpoint, so that a machine that serves builds engines without it.
"""

from __future__ import annotations

import logging
from contextlib import nullcontext
from pathlib import Path

import msgspec

from data_pipeline.common.errors import UserError
from data_pipeline.common.files import check_writable
from data_pipeline.datasets.dataset import Dataset
from infer.bundle.load import Bundle, find_bundle, is_bundle, load_bundle
from infer.bundle.schema import ENGINE_NAME, FeatureLayer, Format, Precision
from infer.export.options import (
    DEFAULT_MAX_BATCH,
    DEFAULT_OPSET,
    EngineOptions,
    OnnxOptions,
    check_max_batch,
    choose_builder,
    parse_formats,
)
from infer.export.triton import check_engine, check_repository, write_repository
from infer.runtime.choose import tensorrt_versions
from infer.runtime.cuda import scan_gpus

log = logging.getLogger("infer")

TORCHVISION = Path("torchvision")
"""In place of a checkpoint: torchvision's published weights."""
RUNS = Path("runs")
"""The folder in which their run is made, where other commands look for the newest one."""


class ExportOptions(msgspec.Struct, frozen=True, kw_only=True):
    """The options of the command; None where one was not given."""

    source: Path | None = None
    formats: str | None = None
    precision: Precision | None = None
    calibrate: Path | None = None
    gpu: str = ""
    opt_batch: int | None = None
    builder_level: int | None = None
    timing_cache: Path | None = None
    out: Path | None = None
    data: Path | None = None
    max_batch: int | None = None
    triton: Path | None = None
    opset: int | None = None
    one_file: bool = False
    mirror: str | None = None
    features: FeatureLayer | None = None

    def onnx(self) -> OnnxOptions:
        """The options for writing ONNX files."""
        opset = DEFAULT_OPSET if self.opset is None else self.opset
        return OnnxOptions(opset=opset, one_file=self.one_file, features=self.features)

    def engine(self) -> EngineOptions:
        """The options for building engines."""
        return EngineOptions(
            gpus=tuple(filter(None, self.gpu.split(","))),
            tuned_batch=self.opt_batch,
            builder_level=self.builder_level,
            timing_cache=self.timing_cache,
        )


class Exported(msgspec.Struct, frozen=True, kw_only=True):
    """The result of an export: bundles by format, and the folders of Triton's models."""

    bundles: dict[Format, Bundle]
    triton: list[Path]


def run_export(options: ExportOptions) -> Exported:
    """Export a checkpoint or torchvision's weights, or build a bundle's engine; write Triton's models, too.

    Raises:
        UserError, CorruptFileError, BuildError, GateError: see `pipeline` and `rebuild`.
    """
    if options.source == TORCHVISION:
        return _from_torchvision(options)
    if options.mirror is not None:
        raise UserError(f"--mirror is for `alexnet export {TORCHVISION}`, which fetches its weights")
    if options.source is not None and is_bundle(options.source):
        return _from_bundle(options, find_bundle(options.source))
    return _from_checkpoint(options)


def _from_torchvision(options: ExportOptions) -> Exported:
    """Fetch the weights, make a run of them, and export that.

    Without `--data`, the gate compares on photographs that have no labels.
    """
    labelled = options.data is not None
    if options.precision == "int8" and not labelled:
        raise UserError(
            "--precision int8 is judged by its accuracy: name ImageNet, which has labels, with --data"
        )
    _check_options(options)
    check_writable(RUNS, "the run of these weights is made there: start it in another folder")
    from infer.export.gate import photograph_windows
    from train.pretrained.published import fetch_torchvision
    from train.weights import import_weights

    checkpoint = import_weights(fetch_torchvision(options.mirror), RUNS)
    with nullcontext() if labelled else photograph_windows() as images:
        return _from_checkpoint(msgspec.structs.replace(options, source=checkpoint), images)


def _check_options(options: ExportOptions) -> tuple[tuple[Format, ...], Precision]:
    """Raise at once what would be raised after the export; returns formats and precision."""
    formats, precision = parse_formats(options.formats or "onnx"), options.precision or "fp32"
    check_max_batch(DEFAULT_MAX_BATCH if options.max_batch is None else options.max_batch)
    options.onnx()
    options.engine()
    _check_triton(options, formats, precision, builds="trt" in formats)
    return formats, precision


def _from_checkpoint(options: ExportOptions, images: Dataset | None = None) -> Exported:
    formats, precision = _check_options(options)
    from infer.export.pipeline import export_models
    from train.checkpoints.load import find_checkpoint

    folder = find_checkpoint(options.source)
    log.info("checkpoint: %s", folder)
    bundles = export_models(
        folder,
        formats,
        data=options.data,
        out=options.out,
        max_batch=DEFAULT_MAX_BATCH if options.max_batch is None else options.max_batch,
        precision=precision,
        calibrate=options.calibrate,
        options=options.engine(),
        onnx_options=options.onnx(),
        images=images,
    )
    models = [] if options.triton is None else write_repository(options.triton, bundles)
    return Exported(bundles=bundles, triton=models)


def _from_bundle(options: ExportOptions, folder: Path) -> Exported:
    wanted = None if options.formats is None else parse_formats(options.formats)
    engine = options.engine()
    building = wanted is not None and "trt" in wanted
    # An engine that is replaced need not be intact.
    bundle = load_bundle(folder, without=(ENGINE_NAME,) if building else ())
    manifest = bundle.manifest
    if options.precision not in (None, manifest.precision):
        raise UserError(f"{folder} is in {manifest.precision}: export a checkpoint in {options.precision}")
    if options.calibrate is not None:
        raise UserError("--calibrate is for a checkpoint; a bundle has its ranges already")
    fixed = {"--opset": options.opset, "--one-file": options.one_file or None, "--features": options.features}
    if asked := next((name for name, value in fixed.items() if value is not None), None):
        raise UserError(f"{asked} is for a checkpoint; a bundle's ONNX files stay as they are")
    if not building:
        given = {"--out": options.out, "--data": options.data, "--max-batch": options.max_batch}
        other = next((name for name, value in given.items() if value is not None), engine.asked())
        if other:
            raise UserError(f"{other} is for a checkpoint, or for --format trt, which builds an engine")
        if options.triton is None:
            raise UserError(
                f"{folder} is exported already: --format trt builds its engine for this machine, "
                "--triton DIR writes a model repository"
            )
    formats = wanted or (("onnx",) if manifest.engine is None else ("onnx", "trt"))
    _check_triton(options, formats, manifest.precision, builds=building)
    if building:
        from infer.export.rebuild import rebuild_engine

        log.info("bundle: %s", folder)
        bundle = rebuild_engine(
            bundle, out=options.out, max_batch=options.max_batch, data=options.data, options=engine
        )
    bundles: dict[Format, Bundle] = dict.fromkeys(formats, bundle)
    models = [] if options.triton is None else write_repository(options.triton, bundles)
    return Exported(bundles={"trt": bundle} if building else {}, triton=models)


def _check_triton(
    options: ExportOptions, formats: tuple[Format, ...], precision: Precision, *, builds: bool
) -> None:
    """Raise at once what `write_repository` would raise after the export; `builds` an engine or not."""
    if options.triton is None:
        return
    check_repository(options.triton, formats, precision)
    if builds:
        check_engine(choose_builder(tensorrt_versions(), scan_gpus(), options.engine().gpus).library)
