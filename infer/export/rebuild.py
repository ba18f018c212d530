"""Build an engine from a bundle's own ONNX file, for another GPU or TensorRT, where there is no checkpoint.

The ONNX file keeps its bytes, and with them the gate's verdict. The engine is compared with the ONNX file on
validation images where both can run; else the bundle records why not. Imports neither torch nor train:
machines that serve have neither.
"""

from __future__ import annotations

import logging
from contextlib import closing
from functools import partial
from pathlib import Path

import numpy as np
from msgspec.structs import replace

from data_pipeline.common.errors import CorruptFileError, GateError, UserError
from data_pipeline.common.text import printable
from data_pipeline.datasets.dataset import Dataset
from data_pipeline.datasets.open import open_dataset, open_recorded
from data_pipeline.remote.shards import local_root
from data_pipeline.results.card import CARD_NAME
from infer.bundle.card import renew_card
from infer.bundle.describe import rebuild_lines
from infer.bundle.gate_report import LIMITS, Rebuild
from infer.bundle.load import Bundle, data_of_run
from infer.bundle.manifest import now_utc, read_manifest
from infer.bundle.schema import ENGINE_NAME, ONNX_NAME
from infer.bundle.write import copy_beside, copy_files, staging_folder, write_bundle
from infer.export.compare import compare
from infer.export.options import EngineOptions, check_max_batch
from infer.export.to_tensorrt import add_engine
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
        out: folder of the bundle with the engine; None for the bundle's own folder if it has an engine, else
            `trt-<precision>` beside it.
        max_batch: largest batch of the engine; None for the bundle's.
        data: folder with the `val/` images for the comparison with the ONNX file; None for that of the run
            that the bundle lies in, if it is here.
        options: see `EngineOptions`.
    Returns:
        The bundle, verified on the disk.
    Raises:
        UserError: no TensorRT can build here, or `out` is not ours to replace.
        BuildError: TensorRT refused the model.
        GateError: the engine does not agree with the ONNX file.
    """
    manifest = bundle.manifest
    target = _target(bundle, out)
    largest = manifest.max_batch if max_batch is None else max_batch
    check_max_batch(largest)
    with staging_folder(target) as staging:
        copy_files(bundle, manifest.files.keys() - {ENGINE_NAME}, staging)
        draft = add_engine(staging, manifest, largest, options or EngineOptions())
        versions = {k: v for k, v in manifest.versions.items() if not k.startswith("tensorrt")}
        assert manifest.report is not None
        draft = replace(
            draft,
            versions={**versions, **tensorrt_versions()},
            report=replace(manifest.report, engine=None, engine_not_run="built again after the export"),
        )
        rebuild = _compare_with_onnx(Bundle(staging, draft), bundle, data)
        draft = replace(draft, rebuild=rebuild)
        copy_beside(bundle, staging)
        renew_card(staging / CARD_NAME, draft)
        return write_bundle(staging, target, draft)


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


def _compare_with_onnx(draft: Bundle, source: Bundle, data: Path | None) -> Rebuild:
    """Compare the new engine with the ONNX file, or record why that cannot be done here.

    Raises:
        GateError: beyond the limits of the precision.
    """
    manifest = draft.manifest
    rebuilt = partial(Rebuild, created=now_utc(), replaces=source.manifest.engine)
    if problem := why_no_engine(draft, probe_machine()):
        return rebuilt(unknown=f"not run here: {problem}")
    with closing(load_for_gate(draft)) as engine, closing(OnnxBackend(draft, "cpu")) as onnx:
        crop_px = manifest.preprocessing.crop_px
        engine.run(np.zeros((1, crop_px, crop_px, 3), np.uint8))
        try:
            dataset = _images(source, data)
        except UserError as error:
            if data is not None:
                raise
            return rebuilt(unknown=f"it loads and runs here, and was compared on no images: {error}")
        by_onnx, by_engine = partial(onnx.run, features=True), partial(engine.run, features=True)
        found = compare(by_onnx, {ENGINE_NAME: by_engine}, dataset, manifest)
    agreement = found.agreements[ENGINE_NAME]
    rebuild = rebuilt(
        data=printable(dataset.root.resolve().name),
        split=dataset.split,
        num_images=found.num_images,
        num_failed=found.num_failed,
        onnx_accuracy=found.reference_accuracy,
        agreement=agreement,
    )
    if beyond := agreement.beyond(LIMITS[manifest.precision], found.reference_accuracy):
        for line in rebuild_lines(rebuild, LIMITS[manifest.precision]):
            log.info("%s", line)
        raise GateError(
            f"gate: {ENGINE_NAME} does not agree with {ONNX_NAME} ({'; '.join(beyond)}); nothing was replaced"
        )
    return rebuild


def _images(bundle: Bundle, data: Path | None) -> Dataset:
    root = local_root(data or data_of_run(bundle), ["val"])
    dataset = open_dataset(root, "val") if data else open_recorded(root, "val")
    if tuple(map(printable, dataset.classes)) != bundle.manifest.classes:
        raise UserError(
            f"{printable(dataset.root)}/val has other classes than the model: name its data with --data"
        )
    return dataset
