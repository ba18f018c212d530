"""The gate: an export or an engine that disagrees with its checkpoint is not shipped."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

import infer.export.gate
import infer.export.pipeline
from data_pipeline.common.errors import GateError, UserError
from infer.bundle.load import Bundle
from infer.export.pipeline import export_models
from infer.runtime.base import Outputs
from infer.runtime.choose import probe_machine, why_no_engine
from infer.runtime.onnx import OnnxBackend
from tests.helpers.infer_samples import (
    CLASSES,
    checkpoint_folder,
    export_model,
    take_onnx_files,
)
from train.checkpoints.load import Checkpoint, load_checkpoint

pytestmark = pytest.mark.usefixtures("thin")


class Stand(OnnxBackend):
    """The ONNX file in place of an engine that this machine cannot run, with its probabilities changed."""

    by = 0.0

    def __init__(self, bundle: Bundle) -> None:
        assert bundle.engine_path is not None and bundle.engine_path.exists()
        super().__init__(bundle, "cpu")

    def run(self, images_NHWC: NDArray[np.uint8], *, features: bool = False) -> Outputs:
        probabilities_NC, _ = super().run(images_NHWC)
        return Outputs((1 - self.by) * probabilities_NC + self.by * probabilities_NC[:, ::-1])


@pytest.mark.slow
def test_gate_compares_an_engine_with_the_checkpoint(
    base: Path, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    take_onnx_files(bundle, monkeypatch)
    monkeypatch.setattr(infer.export.gate, "why_no_engine", lambda bundle, machine: None)
    monkeypatch.setattr(infer.export.gate, "load_for_gate", Stand)
    monkeypatch.setattr(Stand, "by", 2e-5)
    made = export_models(checkpoint_folder(base), ("trt", "onnx"), max_batch=8, out=tmp_path / "both")
    assert list(made) == ["trt", "onnx"]
    first, second = made["onnx"].manifest, made["trt"].manifest
    assert first.report is not None and second.report is not None
    assert first.report.engine is None and first.files.items() < second.files.items()
    assert second.report.onnx == first.report.onnx and second.report.cpu == first.report.cpu
    assert second.report.engine is not None and second.report.engine_not_run is None
    assert 1e-6 < second.report.engine.max_probability_difference <= 3e-5
    monkeypatch.setattr(Stand, "by", 0.01)
    with pytest.raises(GateError, match=r"model\.engine does not agree with its checkpoint"):
        export_models(checkpoint_folder(base), ("trt",), max_batch=8, out=tmp_path / "alone")
    assert not (tmp_path / "alone").exists()


@pytest.fixture
def checkpoint(base: Path) -> Checkpoint:
    return load_checkpoint(checkpoint_folder(base))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "words"),
    [(2e-3, r"a probability differs by .*, more than 0\.0001"), (10.0, "top-1 agreement")],
)
def test_export_that_differs_is_not_shipped(
    base: Path, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: float, words: str
) -> None:
    def alter(checkpoint: Checkpoint, path: Path, **options: object) -> None:
        model = onnx.load(bundle.onnx_path)
        (bias,) = (t for t in model.graph.initializer if t.name.endswith("fc8.bias"))
        values = onnx.numpy_helper.to_array(bias).copy()
        values[::2] += change
        bias.CopyFrom(onnx.numpy_helper.from_array(values, bias.name))
        onnx.save(model, path)

    take_onnx_files(bundle, monkeypatch)
    monkeypatch.setattr(infer.export.pipeline, "export_onnx", alter)
    out = tmp_path / "export" / "onnx-fp32"
    with pytest.raises(GateError, match=words) as raised:
        export_model(checkpoint_folder(base), "onnx", out=out)
    assert raised.value.exit_code == 4
    assert list(out.parent.iterdir()) == []


@pytest.mark.slow
def test_gate_needs_images_of_the_same_classes(
    base: Path, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    take_onnx_files(bundle, monkeypatch)
    folder = checkpoint_folder(base)
    with pytest.raises(UserError, match="no data folder"):
        export_model(folder, "onnx", data=tmp_path / "nowhere", out=tmp_path / "out")
    for name in ("cat", "dog"):
        (tmp_path / "data" / "val" / name).mkdir(parents=True)
        (tmp_path / "data" / "val" / name / "1.jpg").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"has other classes than .* was trained on \(2 and 10\)"):
        export_model(folder, "onnx", data=tmp_path / "data", out=tmp_path / "out")
    for name in CLASSES:
        (tmp_path / "bad" / "val" / name).mkdir(parents=True)
        (tmp_path / "bad" / "val" / name / "1.jpg").write_bytes(b"no image")
    with pytest.raises(UserError, match="none of the 10 validation images"):
        export_model(folder, "onnx", data=tmp_path / "bad", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.gpu
def test_engine_was_gated_on_this_gpu(bundle: Bundle) -> None:
    if reason := why_no_engine(bundle, probe_machine()):  # TensorRT-RTX's engines load on no Hopper
        pytest.skip(reason)
    gate = bundle.manifest.report
    assert gate is not None and gate.engine is not None, gate and gate.engine_not_run
    assert gate.engine.max_probability_difference <= 1e-4
