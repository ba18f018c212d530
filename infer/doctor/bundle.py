"""`alexnet doctor BUNDLE`: verify a bundle, report where it comes from, and run what runs on this machine."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import msgspec
import numpy as np

from data_pipeline.common.errors import CorruptFileError, UserError
from infer.bundle.describe import gate_lines
from infer.bundle.gate_report import LIMITS, GateReport, Rebuild
from infer.bundle.load import Bundle, file_problem, find_bundle, names_beside
from infer.bundle.manifest import Manifest, read_digest, read_manifest
from infer.bundle.schema import (
    CPU_NAME,
    ENGINE_NAME,
    MANIFEST_NAME,
    ONNX_NAME,
    Calibration,
    Engine,
    Origin,
    PrecisionCheck,
)
from infer.runtime.base import InferenceBackend
from infer.runtime.choose import Machine, decide, probe_machine, rebuild_advice, why_no_cuda, why_no_engine
from infer.runtime.onnx import OnnxBackend

_ON_GPU = f"{ONNX_NAME} on the GPU"


class FileStatus(msgspec.Struct, frozen=True, kw_only=True):
    """A file of the bundle as listed in the manifest; `problem` is how it differs, or None."""

    name: str
    size_bytes: int
    sha256: str
    problem: str | None = None


class BundleReport(msgspec.Struct, frozen=True, kw_only=True):
    """The doctor's findings on one bundle.

    Attributes:
        healthy: whether every file is what was exported, and they belong together.
        manifest_sha256: the manifest's digest, and with it the one name of the whole bundle.
        beside: the card and the weights, where they are there: for people and other programs.
        unlisted: other files in the folder that the manifest does not list; nothing uses them.
        loads_on: for each file, which libraries and GPUs load it.
        here: for each file and device, `ok: …` after it was loaded and ran, or why it does not.
        predict_would_use: the choice of `alexnet predict` without options.
        advice: the command that builds an engine for this machine; None where one runs, or none can be built.
    """

    folder: str
    healthy: bool
    created: str
    schema_version: int
    manifest_sha256: str
    format: str
    precision: str
    num_classes: int
    max_batch: int
    files: list[FileStatus]
    beside: list[str]
    unlisted: list[str]
    checkpoint: Origin
    versions: dict[str, str]
    precision_check: PrecisionCheck = msgspec.field(name="proof")
    calibration: Calibration | None
    engine: Engine | None
    gate: GateReport
    gate_limits_are_todays: bool
    rebuild: Rebuild | None
    loads_on: dict[str, str]
    here: dict[str, str]
    predict_would_use: str | None
    advice: str | None


# The findings that are parts of the manifest, under the same names.
_OF_MANIFEST = (set(BundleReport.__struct_fields__) & set(Manifest.__struct_fields__)) - {"files"}


def examine_bundle(path: Path) -> BundleReport:
    """Verify a bundle, load what can be loaded here, and run a grey image through it.

    Args:
        path: the bundle's folder, a file in it, or a run's folder for its newest export.
    Raises:
        UserError: there is no bundle here.
        CorruptFileError: the manifest itself is damaged or was changed: then nothing in it can be trusted.
    """
    folder = find_bundle(path)
    manifest = read_manifest(folder)
    assert manifest.report is not None
    bundle, machine = Bundle(folder, manifest), probe_machine()
    files = _examine_files(bundle)
    whole = {file.name for file in files if file.problem is None}
    here = _try_here(bundle, machine, whole)
    healthy = len(whole) == len(files) and not any(text.startswith("damaged") for text in here.values())
    advice, beside = None, names_beside(folder)
    if ENGINE_NAME not in whole or why_no_engine(bundle, machine):
        advice = rebuild_advice(folder, machine)
    return BundleReport(
        folder=str(folder),
        healthy=healthy,
        **{name: getattr(manifest, name) for name in _OF_MANIFEST},
        manifest_sha256=read_digest(folder),
        num_classes=len(manifest.classes),
        files=files,
        beside=beside,
        unlisted=sorted({p.name for p in folder.iterdir()} - {*manifest.files, MANIFEST_NAME, *beside}),
        gate=manifest.report,
        gate_limits_are_todays=manifest.report.limits == LIMITS[manifest.precision],
        loads_on=_loads_on(bundle),
        here=here,
        predict_would_use=_choice(bundle, machine, here) if healthy else None,
        advice=advice,
    )


def _examine_files(bundle: Bundle) -> list[FileStatus]:
    """Compare each file with the manifest; an engine must name its checkpoint, too."""
    manifest, files = bundle.manifest, []
    for name, entry in manifest.files.items():
        path = bundle.folder / name
        problem = file_problem(path, entry)
        if name == ENGINE_NAME and problem is None and not _holds(path, manifest.checkpoint.sha256):
            problem = "does not name the checkpoint that it should be built from"
        files.append(FileStatus(name=name, size_bytes=entry.size_bytes, sha256=entry.sha256, problem=problem))
    return files


def _holds(plan: Path, sha256: str) -> bool:
    """Whether a plan holds a checkpoint's hash, which is the name of its network; needs no GPU."""
    return sha256.encode() in plan.read_bytes()


def report_lines(report: BundleReport) -> list[str]:
    """Format the report for people."""
    checkpoint = report.checkpoint
    metrics = ", ".join(f"{name} {value:.4g}" for name, value in checkpoint.metrics.items())
    lines = [
        f"bundle: {report.folder}",
        f"  {report.precision}, batches of 1 to {report.max_batch}, {report.num_classes} classes",
        f"  exported {report.created.partition('.')[0]} UTC, schema {report.schema_version}",
        f"  manifest SHA-256: {report.manifest_sha256}",
        "files:",
        *(
            f"  {file.name}: {file.problem or 'ok'}, {file.size_bytes / 1e6:.1f} MB, SHA-256 {file.sha256}"
            for file in report.files
        ),
        *(f"  {name}: for people and other programs; nothing here reads it" for name in report.beside),
        *(f"  {name}: not listed in {MANIFEST_NAME}; nothing uses it" for name in report.unlisted),
        "provenance:",
        f"  checkpoint: SHA-256 {checkpoint.sha256}",
        f"  {checkpoint.model}, recipe {checkpoint.recipe}, step {checkpoint.step}, epoch {checkpoint.epoch}"
        f"{f'; {metrics}' if metrics else ''}",
        f"  made with {', '.join(f'{name} {version}' for name, version in report.versions.items())}",
        f"  precision, read from {ONNX_NAME}: {report.precision_check.words()}",
    ]
    if report.calibration is not None:
        lines.append(f"  {report.calibration.words()}")
    lines += gate_lines(report.gate, report.rebuild)
    if not report.gate_limits_are_todays:
        lines.append("  (those were the limits of its version; this one has others)")
    lines += ["loads on:", *(f"  {name}: {words}" for name, words in report.loads_on.items())]
    lines += ["here:", *(f"  {name}: {words}" for name, words in report.here.items())]
    if report.predict_would_use is not None:
        lines.append(f"  alexnet predict would use {report.predict_would_use}")
    if report.advice is not None:
        lines.append(f"  {report.advice}")
    return lines


def _loads_on(bundle: Bundle) -> dict[str, str]:
    manifest = bundle.manifest
    words = f"exported with ONNX Runtime {manifest.versions.get('onnxruntime-gpu', 'unknown')}"
    if needs := manifest.precision_check.runtime_words():
        words = f"{needs}, on CPU and GPUs; {words}"
    found = {ONNX_NAME: words}
    if manifest.cpu is not None:
        found[CPU_NAME] = manifest.cpu.words()
    if manifest.engine is not None:
        found[ENGINE_NAME] = manifest.engine.words()
    return found


def _on_cpu(bundle: Bundle) -> str:
    return f"{bundle.cpu_path.name} on the CPU"


def _try_here(bundle: Bundle, machine: Machine, whole: set[str]) -> dict[str, str]:
    """Load each whole file on each device of this machine, and run it once."""
    onnx, here = ONNX_NAME in whole, {}
    whole_cpu = onnx and bundle.cpu_path.name in whole  # it may read its weights from the other
    here[_on_cpu(bundle)] = _try(lambda: OnnxBackend(bundle, "cpu"), bundle) if whole_cpu else "damaged"
    if reason := why_no_cuda(machine):
        here[_ON_GPU] = f"no: {reason}"
    else:
        here[_ON_GPU] = _try(lambda: OnnxBackend(bundle, "cuda"), bundle) if onnx else "damaged"
    if bundle.manifest.engine is None:
        return here
    if ENGINE_NAME not in whole:
        here[ENGINE_NAME] = "damaged"
    elif reason := why_no_engine(bundle, machine):
        here[ENGINE_NAME] = f"no: {reason}"
    else:
        from infer.runtime.tensorrt import TensorRTBackend, engine_validity

        validity = engine_validity(bundle)
        verdict = _try(lambda: TensorRTBackend(bundle), bundle)
        here[ENGINE_NAME] = verdict if validity is None else f"{verdict}; the library calls it {validity}"
    return here


def _try(load: Callable[[], InferenceBackend], bundle: Bundle) -> str:
    """Load and run a grey image: `ok: …`, `no: …`, or `damaged: …` for a file of another bundle."""
    crop_px = bundle.manifest.preprocessing.crop_px
    try:
        with closing(load()) as backend:
            total = float(backend.run(np.full((1, crop_px, crop_px, 3), 128, np.uint8)).probabilities.sum())
            if not abs(total - 1) < 1e-2:
                return f"damaged: its probabilities add up to {total:.3g}"
            return f"ok: ran on {backend.device} with {backend.provider}"
    except CorruptFileError as error:
        return f"damaged: {error}"
    except UserError as error:
        return f"no: {error}"


def _choice(bundle: Bundle, machine: Machine, here: dict[str, str]) -> str | None:
    """The choice of `alexnet predict`, or, where that fails here, what it uses in its place."""
    on_cpu = _on_cpu(bundle)
    usable = [name for name in (ENGINE_NAME, _ON_GPU, on_cpu) if here.get(name, "").startswith("ok")]
    if not usable:
        return None
    decision = decide(bundle, "auto", "auto", machine)
    on_gpu = _ON_GPU if decision.runtime == "onnx" else ENGINE_NAME
    chosen = on_gpu if decision.device == "cuda" else on_cpu
    why = decision.why if chosen == usable[0] else f"{chosen} fails"
    return f"{'its engine on the GPU' if usable[0] == ENGINE_NAME else usable[0]} ({why})"
