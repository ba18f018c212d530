"""Export of a checkpoint: the manifest of what was written, and the bounds of its options."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch

from data_pipeline.common.errors import UserError
from infer.bundle.load import Bundle, load_bundle
from tests.helpers.infer_samples import (
    IMAGES_PER_CLASS,
    NORMED,
    checkpoint_folder,
    data_folder,
    export_model,
    take_onnx_files,
)
from train.checkpoints.load import Checkpoint, load_checkpoint

pytestmark = pytest.mark.usefixtures("thin")


@pytest.fixture
def checkpoint(base: Path) -> Checkpoint:
    return load_checkpoint(checkpoint_folder(base))


def test_manifest_names_its_checkpoint(bundle: Bundle) -> None:
    manifest = bundle.manifest
    assert (manifest.checkpoint.step, manifest.checkpoint.recipe, manifest.checkpoint.model) == (
        7,
        "demo",
        "paper",
    )
    assert manifest.checkpoint.metrics == {"top1": 0.5, "loss": 1.5}
    assert manifest.versions["torch"] == torch.__version__.split("+")[0]
    assert manifest.max_batch == 8
    assert bundle.folder.name == "trt-fp32" and bundle.folder.parent.name == "export"
    gate = manifest.report
    assert gate is not None and gate.num_images == gate.num_available == 10 * IMAGES_PER_CLASS
    assert gate.onnx.top1_agreement == gate.onnx.top5_agreement == 1
    assert 0 <= gate.onnx.max_probability_difference < 1e-5
    assert gate.onnx.accuracy == gate.checkpoint_accuracy


def test_engine_names_the_gpus_on_which_it_loads(bundle: Bundle, checkpoint: Checkpoint) -> None:
    engine = bundle.manifest.engine
    assert engine is not None and bundle.engine_path is not None
    assert engine.profile_batches == (1, 8, 8)
    plan = bundle.engine_path.read_bytes()
    assert checkpoint.sha256.encode() in plan
    assert str(Path.cwd()).encode() not in plan
    if engine.library == "tensorrt_rtx":
        assert engine.gpus == ("sm80", "sm86", "sm89", "sm120", "sm121")
        gate = bundle.manifest.report
        assert gate is not None and (gate.engine is None) == bool(gate.engine_not_run)


@pytest.mark.parametrize("max_batch", [0, 4097])
def test_max_batch_has_bounds(base: Path, max_batch: int) -> None:
    with pytest.raises(UserError, match="from 1 to 4096"):
        export_model(checkpoint_folder(base), "onnx", max_batch=max_batch)


@pytest.mark.slow
def test_network_of_the_keys_passes_the_gate(base: Path, tmp_path: Path) -> None:
    """In float32, with an engine; norms behind a ReLU stay operators of their own."""
    (tmp_path / "digits").symlink_to(data_folder(base))
    folder = checkpoint_folder(tmp_path, overrides=NORMED)
    bundle = export_model(folder, "trt", max_batch=8, out=tmp_path / "trt")
    report = bundle.manifest.report
    assert report is not None and report.onnx.top1_agreement == 1 and bundle.engine_path is not None
    assert report.onnx.mean_probability_difference < 1e-6
    operators = [node.op_type for node in onnx.load(bundle.onnx_path).graph.node]
    counted = {kind: operators.count(kind) for kind in ("Conv", "BatchNormalization", "LRN", "Gemm")}
    assert counted == {"Conv": 5, "BatchNormalization": 7, "LRN": 0, "Gemm": 3}
    named = "paper (stem_kernel=5, groups=1, norm=bn_after_relu, hidden_norm, pool_padding=1)"
    assert bundle.manifest.checkpoint.model == named


@pytest.mark.slow
def test_onnx_bundle_with_a_max_batch_of_1(
    base: Path, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    take_onnx_files(bundle, monkeypatch)
    made = export_model(checkpoint_folder(base), "onnx", max_batch=1, out=tmp_path / "one")
    assert load_bundle(tmp_path / "one") == made and made.manifest.max_batch == 1
    assert made.engine_path is None and sorted(p.name for p in made.folder.iterdir()) == [
        "README.md",
        "bundle.json",
        "model.cpu.onnx",
        "model.onnx",
        "model.safetensors",
    ]
