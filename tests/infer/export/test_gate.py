"""The gate with an engine that runs here: compared with the checkpoint, once for all files of an export."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

import infer.export.gate
from data_pipeline.common.errors import GateError
from infer.bundle.load import Bundle
from infer.export.pipeline import export_models
from infer.runtime.onnx import OnnxBackend
from tests.helpers.infer_samples import checkpoint_folder


class Stand(OnnxBackend):
    """The ONNX file in place of an engine that this machine cannot run, with its probabilities changed."""

    by = 0.0

    def __init__(self, bundle: Bundle) -> None:
        assert bundle.engine_path is not None and bundle.engine_path.exists()
        super().__init__(bundle, "cpu")

    def run(self, images_NHWC: NDArray[np.uint8]) -> NDArray[np.float32]:
        probabilities_NC = super().run(images_NHWC)
        return (1 - self.by) * probabilities_NC + self.by * probabilities_NC[:, ::-1]


def test_gate_compares_an_engine_with_the_checkpoint(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
