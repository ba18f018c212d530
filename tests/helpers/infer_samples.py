"""Real checkpoints, data and exports for the tests of `infer`, made once a run."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

import msgspec
import pytest
import torch

import infer.export.pipeline
from data_pipeline.common.files import sha256_of
from data_pipeline.datasets.demo import write_demo
from data_pipeline.results.sealed import SEAL, encode_sealed, seal_of
from infer.bundle.gate_report import LIMITS, Agreement, GateReport
from infer.bundle.load import Bundle, load_bundle
from infer.bundle.manifest import SCHEMA_VERSION, Manifest
from infer.bundle.schema import (
    MANIFEST_NAME,
    Engine,
    FileEntry,
    Format,
    Origin,
    PrecisionCheck,
    image_input,
    probability_output,
)
from infer.export.options import DEFAULT_OPSET, OnnxOptions
from infer.export.pipeline import export_models
from infer.export.to_onnx import ContractModel
from infer.predict.inputs import find_inputs
from tests.helpers.thin_networks import are_thin, published_networks, thin_networks
from train.checkpoints.format import Snapshot
from train.checkpoints.write import save_checkpoint
from train.config.load import make_config
from train.models.alexnet import AlexNet, make_model
from train.models.batch_norm import BatchNorm

IMAGES_PER_CLASS = 5
CLASSES = tuple("0123456789")


def data_folder(base: Path, demo: Path | None = None) -> Path:
    """The demo digits, with five validation images a class; all of them are copied from `demo`."""
    root = base / "digits"
    if not root.exists():
        whole = base / "all-digits"
        if demo is not None:
            shutil.copytree(demo, whole)
        write_demo(whole)
        for folder in sorted((whole / "val").iterdir()):
            (root / "val" / folder.name).mkdir(parents=True)
            for file in sorted(folder.iterdir())[:IMAGES_PER_CLASS]:
                shutil.copy(file, root / "val" / folder.name)
    return root


def images_in(folder: Path) -> list[Path]:
    """The image files below a folder, in the order of prediction."""
    return [item for item in find_inputs([folder]) if isinstance(item, Path)]


NORMED = (
    "model.stem_kernel=5", "model.groups=1", "model.norm=bn_after_relu", "model.hidden_norm=true",
    "model.pool_padding=1", "model.hidden_units=64",
)  # fmt: skip
"""`paper` with every key changed that changes its layers."""


def checkpoint_folder(base: Path, model: str = "paper", overrides: Sequence[str] = ()) -> Path:
    """A checkpoint of few hidden units, with weights that make confident and various predictions."""
    others = [] if are_thin() != torch.cuda.is_available() else ["other-width"]
    folder = base / "-".join(["run", model, *overrides, *others]) / "checkpoints" / "step-00000007"
    if not folder.exists():
        sets = [
            f'data.root="{data_folder(base)}"',
            f"model.name={model}",
            "model.hidden_units=512",
            *overrides,
        ]
        config = make_config("demo", sets)
        torch.manual_seed(0)
        network = make_model(config.model, num_classes=10, crop_px=config.preprocessing.crop_px)
        last = [module for module in network.modules() if isinstance(module, torch.nn.Linear)][-1]
        with torch.no_grad():
            last.weight.mul_(8)
            if overrides:
                draw_norms(network)
            for parameter in network.parameters():
                if parameter.ndim == 1 and parameter.count_nonzero() == 0:
                    parameter.normal_(std=0.1)  # the exporter drops biases that are all zero
        save_checkpoint(
            folder.parent,
            Snapshot(
                step=7,
                epoch=1,
                samples_seen=448,
                config=config,
                classes=CLASSES,
                metrics={"top1": 0.5, "loss": 1.5},
                states={"model": network.state_dict()},
            ),
        )
    return folder


def draw_norms(network: AlexNet) -> None:
    """Give batch normalisation statistics, and scales of either sign, as after training."""
    for norm in network.modules():
        if isinstance(norm, BatchNorm):
            assert norm.running_mean is not None and norm.running_var is not None
            values = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
            for tensor, low, high in zip(values, (0, 0.2, -0.5, -0.5), (0.5, 1.5, 1.5, 0.5), strict=True):
                tensor.uniform_(low, high)


@contextmanager
def shared_networks() -> Iterator[None]:
    """Build networks as those of the shared checkpoints: thin, but as published where a GPU computes them."""
    with published_networks() if torch.cuda.is_available() else thin_networks():
        yield


@shared_networks()
def exported(base: Path) -> Bundle:
    """The checkpoint as a bundle of format `trt`: a real ONNX file and a real engine, gated."""
    folder = checkpoint_folder(base)
    target = folder.parent.parent / "export" / "trt-fp32"
    return load_bundle(target) if target.exists() else export_model(folder, "trt", max_batch=8)


@shared_networks()
def exported_with_features(base: Path) -> Bundle:
    """A checkpoint with 64 hidden units as a bundle of format `onnx` that gives `fc7`."""
    folder = checkpoint_folder(base, "paper", ["model.hidden_units=64"])
    target = folder.parent.parent / "export" / "onnx-fp32"
    if target.exists():
        return load_bundle(target)
    return export_model(folder, "onnx", max_batch=8, onnx_options=OnnxOptions(features="fc7"))


def take_onnx_files(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let exports of a bundle's own checkpoint take its ONNX files, which torch's exporter would write again.

    For tests of what is done with the files.
    """

    def check(model: ContractModel, opset: int) -> None:
        assert model.checkpoint.sha256 == bundle.manifest.checkpoint.sha256
        assert (model.dtype, model.features, opset) == (torch.float32, None, DEFAULT_OPSET)

    def export_onnx(model: ContractModel, path: Path, *, opset: int) -> None:
        check(model, opset)
        shutil.copy(bundle.onnx_path, path)

    def export_for_cpu(model: ContractModel, path: Path, weights: Path | None, *, opset: int) -> None:
        check(model, opset)
        assert weights is not None, "the file that the bundle's own reads"
        shutil.copy(bundle.cpu_path, path)

    monkeypatch.setattr(infer.export.pipeline, "export_onnx", export_onnx)
    monkeypatch.setattr(infer.export.pipeline, "export_for_cpu", export_for_cpu)


@contextmanager
def captured_once() -> Iterator[None]:
    """Let torch's exporter capture and decompose a model once for all its exports, which differ in opset.

    That is most of an export's time and does not know the opset, but only for which operators torch's
    exporter has a translation. To translate, to optimise and all that `export_onnx` does is done each time.
    """
    core: Any = import_module("torch.onnx._internal.exporter._core")
    strategy: Any = import_module(
        "torch.onnx._internal.exporter._capture_strategies"
    ).TorchExportNonStrictStrategy
    capture, prepare = strategy._capture, core._prepare_exported_program_for_export
    captured: dict[object, Any] = {}  # keeps the programs, so that their ids stay theirs
    prepared: dict[object, Any] = {}

    def capture_once(self: Any, model: ContractModel, args: Any, *others: Any) -> Any:
        state = tuple((name, t.shape, float(t.double().sum())) for name, t in model.state_dict().items())
        shapes = tuple((arg.shape, arg.dtype) for arg in args)
        key = (model.checkpoint.sha256, repr(model), model.dtype, model.features, state, shapes)
        if key not in captured:
            captured[key] = capture(self, model, args, *others)
        return captured[key]

    def prepare_once(program: Any, *, registry: Any) -> Any:
        key = (id(program), frozenset(registry.functions))
        if key not in prepared:
            prepared[key] = prepare(program, registry=registry)
        return prepared[key]

    with (
        mock.patch.object(strategy, "_capture", capture_once),
        mock.patch.object(core, "_prepare_exported_program_for_export", prepare_once),
    ):
        yield


def export_model(checkpoint: Path, format: Format, **options: Any) -> Bundle:
    """Export a checkpoint in one format, with the options of `export_models`."""
    return export_models(checkpoint, (format,), **options)[format]


def tiny_manifest(**changes: object) -> Manifest:
    """A manifest that is consistent in itself, without files behind it."""
    agreement = Agreement(
        top1_agreement=1.0,
        top5_agreement=1.0,
        num_ties=0,
        max_probability_difference=1e-7,
        mean_probability_difference=1e-8,
        accuracy=0.9,
    )
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        created="2026-01-02T03:04:05.000000+00:00",
        format="onnx",
        precision="fp32",
        max_batch=8,
        classes=("cat", "dog"),
        preprocessing=make_config("demo").preprocessing,
        inputs=(image_input(56),),
        outputs=(probability_output(2),),
        files={"model.onnx": FileEntry(sha256="0" * 64, size_bytes=0)},
        checkpoint=Origin(sha256="1" * 64, step=7, epoch=1, recipe="demo", model="paper"),
        versions={},
        precision_check=PrecisionCheck(
            computed_in={}, num_values={}, num_quantize=0, num_dequantize=0, opset=20, ir_version=10
        ),
        report=GateReport(
            data="digits",
            split="val",
            num_images=50,
            num_available=50,
            num_failed=0,
            checkpoint_accuracy=0.9,
            limits=LIMITS["fp32"],
            onnx=agreement,
            onnx_provider="ONNX Runtime CPUExecutionProvider",
        ),
    )
    return msgspec.structs.replace(manifest, **changes)


def with_engine(
    library: str = "tensorrt_rtx", version: str = "1.7", gpus: tuple[str, ...] = ("sm89",)
) -> Manifest:
    """The tiny manifest in format `trt`."""
    nothing = FileEntry(sha256="0" * 64, size_bytes=0)
    engine = msgspec.convert(
        {
            "library": library,
            "version": version,
            "gpus": gpus,
            "profile_batches": (1, 8, 8),
            "builder_level": 3,
        },
        Engine,
    )
    report = tiny_manifest().report
    assert report is not None
    return tiny_manifest(
        format="trt",
        engine=engine,
        files={"model.onnx": nothing, "model.engine": nothing},
        report=msgspec.structs.replace(report, engine_not_run="no NVIDIA driver"),
    )


def write_tiny(
    folder: Path, manifest: Manifest | None = None, content: bytes = b"not really a model"
) -> Path:
    """A bundle whose files are a few bytes: enough for whatever does not run it."""
    manifest = manifest or tiny_manifest()
    folder.mkdir(parents=True, exist_ok=True)
    for name in manifest.files:
        (folder / name).write_bytes(content)
    files = {
        name: FileEntry(sha256=sha256_of(folder / name), size_bytes=len(content)) for name in manifest.files
    }
    manifest = msgspec.structs.replace(manifest, files=files)
    (folder / MANIFEST_NAME).write_bytes(encode_sealed(manifest))
    return folder


def edit_manifest(folder: Path, **changes: object) -> None:
    """Change keys of a manifest and its digest with them, as somebody would who knows how."""
    path = folder / MANIFEST_NAME
    plain = {**msgspec.json.decode(path.read_bytes(), type=dict[str, Any]), **changes}
    path.write_bytes(msgspec.json.encode({**plain, SEAL: seal_of(plain)}))
