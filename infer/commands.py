"""What the commands that serve do, put together from the parts. Imports neither torch nor train."""

from __future__ import annotations

import logging
from contextlib import closing
from pathlib import Path

import msgspec

from data_pipeline.errors import UserError
from data_pipeline.layouts import open_dataset
from infer.backends import DeviceName, choose_backend
from infer.bundle import Bundle, Limits, Proof, find_bundle, load_bundle
from infer.evaluate import Evaluation, evaluate_bundle

log = logging.getLogger("infer")


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
