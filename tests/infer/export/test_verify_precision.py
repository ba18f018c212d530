"""Precisions: proven from the file, judged by limits of their own, built into engines."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import onnx
import onnxruntime
import pytest
from click.testing import CliRunner
from msgspec.structs import replace

import infer.export.pipeline
from alexnet import main
from data_pipeline.common.errors import GateError, UserError
from data_pipeline.results.card import WEIGHTS_NAME
from infer.bundle.gate_report import LIMITS
from infer.bundle.load import Bundle, load_bundle
from infer.export.compare import measure_agreement
from infer.export.gate import check_limits, torch_runner
from infer.export.options import EngineOptions, choose_builder, parse_formats
from infer.export.to_onnx import ContractModel, export_onnx
from infer.export.to_tensorrt import build_engine, check_plan_size
from infer.export.verify_precision import check_precision
from infer.runtime.cuda import Gpu, GpuScan
from tests.helpers.infer_samples import checkpoint_folder, data_folder, export_model, tiny_manifest
from train.checkpoints.format import STATE
from train.checkpoints.load import load_checkpoint


@pytest.mark.slow
def test_int8_is_calibrated_gated_and_built_for_the_named_gpus(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With all channels, which the sizes and the accuracy are about, and fewer images than is usual."""
    assert infer.export.pipeline.CALIBRATION_IMAGES == 256
    monkeypatch.setattr(infer.export.pipeline, "CALIBRATION_IMAGES", 48)
    arguments = [
        *("export", checkpoint_folder(base), "--format", "trt", "--precision", "int8", "--max-batch", 8),
        *("--calibrate", base / "all-digits", "--data", data_folder(base), "--out", tmp_path / "b", "--json"),
    ]
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    assert result.exit_code == 0, result.stderr
    bundle = load_bundle(tmp_path / "b")
    manifest = bundle.manifest
    assert msgspec.json.decode(result.stdout)["precision"] == manifest.precision == "int8"
    assert manifest.calibration is not None
    assert (manifest.calibration.split, manifest.calibration.num_images) == ("train", 48)
    check = manifest.precision_check
    assert check.computed_in == {
        "Conv": {"int8": 5}, "Gemm": {"int8": 3}, "LRN": {"float": 2}, "Softmax": {"float": 1},
    }  # fmt: skip
    assert check.num_quantize == check.num_dequantize == 16  # what the 8 products read
    gate = manifest.report
    assert gate is not None and gate.limits == LIMITS["int8"]
    assert gate.onnx.top1_agreement >= 0.99 and gate.onnx.max_probability_difference > 1e-4
    model = onnx.load(bundle.onnx_path)
    assert {p.key for p in model.metadata_props} >= {
        "classes",
        "preprocessing",
        "checkpoint_sha256",
        "recipe",
    }
    assert model.producer_name == "alexnet" and "uint8 RGB images of 56x56 pixels" in model.doc_string
    weights = bundle.folder / WEIGHTS_NAME  # in float32, as in an engine of fp32
    assert bundle.engine_path is not None
    assert bundle.engine_path.stat().st_size < 0.42 * weights.stat().st_size
    with (tmp_path / "large.engine").open("wb") as file:
        file.truncate(4 * bundle.engine_path.stat().st_size + 2**26)
    with pytest.raises(GateError, match=r"large\.engine has .* too much for weights in int8"):
        check_plan_size(tmp_path / "large.engine", check, "int8")


@pytest.mark.slow
def test_fp16_keeps_lrn_and_softmax_in_float32(base: Path, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(checkpoint_folder(base))
    path = tmp_path / "model.onnx"
    export_onnx(ContractModel(checkpoint, half=True), path)
    check = check_precision(path, "fp16")
    assert check.computed_in == {
        "Conv": {"float16": 5}, "Gemm": {"float16": 3}, "LRN": {"float": 2}, "Softmax": {"float": 1},
    }  # fmt: skip
    assert path.stat().st_size < 0.51 * (checkpoint_folder(base) / STATE).stat().st_size
    images = np.random.default_rng(3).integers(0, 256, (3, 56, 56, 3), dtype=np.uint8)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"images": images})
    difference = np.abs(found - torch_runner(checkpoint)(images).probabilities).max()
    assert found.dtype == np.float32 and 1e-7 < difference < 1e-2
    manifest = tiny_manifest(precision="fp16")
    engine = build_engine(path, tmp_path / "e", manifest, 4, EngineOptions())
    if engine.library == "tensorrt_rtx":
        assert engine.gpus[0] == "sm75"
    check_plan_size(tmp_path / "e", check, "fp16")
    with pytest.raises(GateError, match=r"e has \d+ MB, too little for weights in fp32 \(\d+ to \d+ MB\)"):
        check_plan_size(tmp_path / "e", check, "fp32")
    with pytest.raises(GateError, match=r"not fp32 \(Conv in float16 instead of float"):
        check_precision(path, "fp32")


def test_precision_that_is_not_in_the_file_is_refused(bundle: Bundle) -> None:
    for precision in ("fp16", "int8"):
        with pytest.raises(GateError, match=f"is not {precision}") as raised:
            check_precision(bundle.onnx_path, precision)
        assert raised.value.exit_code == 4


def test_engine_gpus_that_cannot_be_built_for_are_refused(bundle: Bundle, tmp_path: Path) -> None:
    one_gpu = GpuScan((Gpu("NVIDIA L4", "sm89"),), None)
    assert (
        choose_builder({"tensorrt": "11", "tensorrt_rtx": "1"}, one_gpu, ("sm120",)).library == "tensorrt_rtx"
    )
    with pytest.raises(UserError, match=r"--gpu sm120: tensorrt builds for this machine's sm89 alone"):
        choose_builder({"tensorrt": "11"}, one_gpu, ("sm120",))

    def build(*gpus: str) -> tuple[str, ...]:
        options = EngineOptions(gpus=gpus)
        return build_engine(bundle.onnx_path, tmp_path / "e", tiny_manifest(), 4, options).gpus

    assert build("sm89", "sm120") == ("sm89", "sm120")
    with pytest.raises(UserError, match=r"--gpu sm90: tensorrt_rtx .* builds for sm80, .* in fp32"):
        build("sm90")


def test_int8_that_loses_accuracy_fails_the_gate() -> None:
    """Agreement of 99% with every hundredth image lost is a point of accuracy: more than half a point."""
    expected = np.tile(np.array([[0.9, 0.1]], np.float32), (100, 1))
    found = expected.copy()
    found[0] = found[0, ::-1]
    found_99 = measure_agreement(expected, found, np.zeros(100, np.int64), LIMITS["int8"])
    report = tiny_manifest().report
    assert report is not None and found_99.top1_agreement == 0.99
    report = replace(report, limits=LIMITS["int8"], checkpoint_accuracy=1.0)
    with pytest.raises(
        GateError, match=r"accuracy 99\.00%, 1\.00 points below the reference's; at most 0\.5"
    ):
        check_limits(replace(report, onnx=found_99))
    # Half a point is within half a point.
    check_limits(replace(report, onnx=replace(found_99, accuracy=0.995)))
    with pytest.raises(GateError, match=r"accuracy 99\.49%, 0\.51 points"):
        check_limits(replace(report, onnx=replace(found_99, accuracy=0.9949)))


def test_export_refuses_wrong_options(base: Path) -> None:
    folder = checkpoint_folder(base)
    with pytest.raises(UserError, match="--calibrate is for --precision int8"):
        export_model(folder, "onnx", calibrate=base)
    with pytest.raises(UserError, match="--gpu is for --format trt"):
        export_model(folder, "onnx", options=EngineOptions(gpus=("sm89",)))
    with pytest.raises(UserError, match="no folder 'train'"):
        export_model(folder, "onnx", precision="int8", out=base / "none")
    for text in ("onnx,onnx", "xml", ""):
        with pytest.raises(UserError, match=f"--format {text}: onnx, trt, or onnx,trt"):
            parse_formats(text)


def test_int8_manifest_needs_its_calibration() -> None:
    with pytest.raises(ValueError, match="the calibration contradict each other"):
        tiny_manifest(precision="int8").__post_init__()
