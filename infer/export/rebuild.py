"""Engines from a bundle's own ONNX file, where there is no checkpoint: for another GPU or another TensorRT.

The ONNX file keeps its bytes, and with them the gate's verdict. The engine goes through the proof of its
size, is held against the ONNX file on validation images where both can run, and otherwise is said to be
unknown. Imports neither torch nor train: it is the machine that serves where this is wanted.
"""

from __future__ import annotations

import logging
import shutil
from contextlib import closing
from pathlib import Path

import numpy as np
from msgspec.structs import replace

from data_pipeline.common.errors import CorruptFileError, GateError, UserError
from data_pipeline.common.text import printable
from data_pipeline.datasets.dataset import Dataset
from data_pipeline.datasets.open import open_dataset
from infer.bundle.describe import rebuild_lines
from infer.bundle.load import Bundle
from infer.bundle.manifest import (
    CPU_NAME,
    ENGINE_NAME,
    LIMITS,
    ONNX_NAME,
    Engine,
    Rebuild,
    beyond_limits,
    now_utc,
    read_manifest,
)
from infer.bundle.write import measure_files, staging_folder, write_bundle
from infer.evaluate import data_of_run
from infer.export.compare import compare
from infer.export.engine_options import EngineOptions, check_max_batch
from infer.export.to_tensorrt import build_engine
from infer.export.verify_precision import check_plan_size
from infer.runtime.choose import probe_machine, tensorrt_versions, why_no_engine
from infer.runtime.onnx import OnnxBackend
from infer.runtime.tensorrt import load_for_gate

log = logging.getLogger("infer")


def rebuild_engine(
    bundle: Bundle,
    *,
    out: Path | None = None,
    max_batch: int | None = None,
    data: Path | None = None,
    options: EngineOptions | None = None,
) -> Bundle:
    """Build the engine of a bundle again, or its first one, from the ONNX file in it.

    Args:
        bundle: a verified bundle.
        out: where the bundle with the engine shall be; None for the bundle's own folder if it has an engine,
            else `trt-<precision>` beside it.
        max_batch: largest batch of the engine; None for the bundle's.
        data: folder with `val/` to hold the engine against the ONNX file on; None for that of the run that
            the bundle lies in, if it is here.
        options: see `EngineOptions`.
    Returns:
        The bundle, verified on the disk.
    Raises:
        UserError: no TensorRT can build here, or `out` is not ours to replace.
        BuildError: TensorRT refused the model.
        GateError: the engine does not agree with the ONNX file.
    """
    manifest = bundle.manifest
    if manifest.proof is None:
        raise UserError(f"{bundle.folder} is older than the proof of precision: export the checkpoint again")
    target = _target(bundle, out)
    largest = manifest.max_batch if max_batch is None else max_batch
    check_max_batch(largest)
    with staging_folder(target) as staging:
        onnx_names = (ONNX_NAME, CPU_NAME) if manifest.cpu is not None else (ONNX_NAME,)
        for name in onnx_names:
            shutil.copyfile(bundle.folder / name, staging / name)
        engine = build_engine(
            staging / ONNX_NAME,
            staging / ENGINE_NAME,
            checkpoint_sha256=manifest.checkpoint.sha256,
            crop_px=manifest.preprocessing.crop_px,
            max_batch=largest,
            precision=manifest.precision,
            options=options,
        )
        check_plan_size(staging / ENGINE_NAME, manifest.proof, manifest.precision)
        files = measure_files(staging, (*onnx_names, ENGINE_NAME))
        for name in onnx_names:
            if files[name] != manifest.files[name]:
                raise CorruptFileError(f"{bundle.folder / name} changed while it was copied")
        assert manifest.report is not None
        draft = replace(
            manifest,
            format="trt",
            max_batch=largest,
            files=files,
            versions=_versions(manifest.versions),
            engine=engine,
            report=replace(manifest.report, engine=None, engine_not_run="built again after the export"),
            rebuild=None,
        )
        rebuild = _evidence(Bundle(staging, draft), bundle, data, manifest.engine)
        return write_bundle(staging, target, replace(draft, rebuild=rebuild))


def _target(bundle: Bundle, out: Path | None) -> Path:
    if out is not None:
        return out
    if bundle.manifest.engine is not None:
        return bundle.folder
    target = bundle.folder.resolve().parent / f"trt-{bundle.manifest.precision}"
    try:
        other = read_manifest(target).checkpoint.sha256
    except (UserError, CorruptFileError):
        return target
    if other != bundle.manifest.checkpoint.sha256:
        raise UserError(f"{target} holds the export of another checkpoint: say where with --out")
    return target


def _versions(before: dict[str, str]) -> dict[str, str]:
    """The versions of the export, with today's TensorRT in place of that day's."""
    kept = {name: version for name, version in before.items() if not name.startswith("tensorrt")}
    return {**kept, **tensorrt_versions()}


def _evidence(draft: Bundle, source: Bundle, data: Path | None, replaces: Engine | None) -> Rebuild:
    """Hold the engine against the ONNX file, or say why that cannot be done here.

    Raises:
        GateError: beyond the limits of the precision.
    """
    manifest = draft.manifest
    limits = LIMITS[manifest.precision]
    if unknown := why_no_engine(draft, probe_machine()):
        return Rebuild(created=now_utc(), replaces=replaces, unknown=f"not run here: {unknown}")
    with closing(load_for_gate(draft)) as engine, closing(OnnxBackend(draft, "cpu")) as onnx:
        crop_px = manifest.preprocessing.crop_px
        engine.run(np.zeros((1, crop_px, crop_px, 3), np.uint8))
        try:
            dataset = _images(source, data)
        except UserError as error:
            if data is not None:
                raise
            why = f"it loads and runs here, and was compared on no images: {error}"
            return Rebuild(created=now_utc(), replaces=replaces, unknown=why)
        found = compare(
            onnx.run,
            {ENGINE_NAME: engine.run},
            dataset,
            manifest.preprocessing,
            limits,
            manifest.max_batch,
        )
    rebuild = Rebuild(
        created=now_utc(),
        replaces=replaces,
        data=printable(dataset.root.resolve().name),
        split=dataset.split,
        num_images=found.num_images,
        num_failed=found.num_failed,
        onnx_accuracy=found.reference_accuracy,
        agreement=found.agreements[ENGINE_NAME],
    )
    beyond = beyond_limits(found.agreements[ENGINE_NAME], limits, found.reference_accuracy)
    if beyond:
        for line in rebuild_lines(rebuild):
            log.info("%s", line)
        raise GateError(
            f"gate: {ENGINE_NAME} does not agree with {ONNX_NAME} ({'; '.join(beyond)}); nothing was replaced"
        )
    return rebuild


def _images(bundle: Bundle, data: Path | None) -> Dataset:
    root = data or data_of_run(bundle)
    dataset = open_dataset(root, "val")
    if tuple(map(printable, dataset.classes)) != bundle.manifest.classes:
        raise UserError(f"{printable(root)}/val has other classes than the model: name its data with --data")
    return dataset
