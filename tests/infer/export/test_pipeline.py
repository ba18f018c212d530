"""Export: the file holds the contract and nothing of this machine, and the gate lets no other model pass."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

import msgspec
import numpy as np
import onnx
import onnxruntime
import pytest
import torch

import infer.export.pipeline
from data_pipeline.common.errors import GateError, UserError
from data_pipeline.transforms.preprocessing import Preprocessing
from infer.bundle.load import Bundle, load_bundle
from infer.export.engine_options import choose_builder, profile_batches
from infer.export.gate import torch_runner
from infer.export.to_onnx import export_onnx
from infer.export.to_tensorrt import BuildError, build_engine
from infer.runtime.cuda import Gpu, GpuScan
from tests.helpers.infer_samples import (
    CLASSES,
    IMAGES_PER_CLASS,
    checkpoint_folder,
    export_model,
    exported,
)
from train.checkpoints.load import Checkpoint, load_checkpoint

NO_GPU = GpuScan((), None, "no NVIDIA driver")
ONE_GPU = GpuScan((Gpu(0, "NVIDIA L4", "sm89"),), "13.0", None)


@pytest.fixture
def checkpoint(base: Path) -> Checkpoint:
    return load_checkpoint(checkpoint_folder(base))


def random_images(n: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    return np.random.default_rng(n).integers(0, 256, (n, 56, 56, 3), dtype=np.uint8)


def test_graph_has_the_contract_and_native_lrn(bundle: Bundle) -> None:
    model = onnx.load(bundle.onnx_path)
    operators = [node.op_type for node in model.graph.node]
    assert operators.count("LRN") == 2
    assert operators[0] == "Cast" and operators[-1] == "Softmax"
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 20)]
    (images,), (probabilities,) = model.graph.input, model.graph.output
    shape = [d.dim_param or d.dim_value for d in images.type.tensor_type.shape.dim]
    assert (images.name, shape) == ("images", ["batch", 56, 56, 3])
    assert images.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    shape = [d.dim_param or d.dim_value for d in probabilities.type.tensor_type.shape.dim]
    assert (probabilities.name, shape) == ("probabilities", ["batch", 10])
    assert all(not tensor.external_data for tensor in model.graph.initializer)


def test_metadata_reaches_onnx_runtime(bundle: Bundle, checkpoint: Checkpoint) -> None:
    session = onnxruntime.InferenceSession(bundle.onnx_path, providers=["CPUExecutionProvider"])
    metadata = session.get_modelmeta().custom_metadata_map
    assert tuple(json.loads(metadata["classes"])) == CLASSES
    assert msgspec.json.decode(metadata["preprocessing"], type=Preprocessing) == checkpoint.preprocessing
    assert metadata["checkpoint_sha256"] == checkpoint.sha256 == bundle.manifest.checkpoint.sha256
    assert tuple(json.loads(metadata["labels"])) == bundle.manifest.class_labels
    assert (metadata["model"], metadata["recipe"], metadata["step"]) == ("paper", "demo", "7")
    assert session.get_modelmeta().producer_name == "alexnet"


def test_files_name_nothing_of_this_machine(bundle: Bundle) -> None:
    model = onnx.load(bundle.onnx_path)
    for tensor in model.graph.initializer:
        tensor.ClearField("raw_data")  # random bytes spell anything
    text = model.SerializeToString() + (bundle.folder / "bundle.json").read_bytes()
    here = [str(Path.cwd()), str(Path.home()), sys.prefix, str(bundle.folder)]
    for word in (*here, "site-packages", ".py", "stack_trace", "pkg.torch"):
        assert word.encode() not in text, word


@pytest.mark.parametrize("n", [1, 3, 8, 33])
def test_onnx_equals_torch_at_any_batch(bundle: Bundle, checkpoint: Checkpoint, n: int) -> None:
    session = onnxruntime.InferenceSession(bundle.onnx_path, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"images": random_images(n)})
    expected = torch_runner(checkpoint)(random_images(n))
    assert found.shape == (n, 10) and found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=3e-5)
    assert np.ptp(expected, axis=1).min() > 0.1  # or the comparison would say little


@pytest.mark.parametrize(("name", "num_lrn"), [("caffe", 2), ("owt", 0), ("bn", 0)])
def test_other_networks_export_and_agree(
    base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str, num_lrn: int
) -> None:
    other = load_checkpoint(checkpoint_folder(base, name))
    export_onnx(other, tmp_path / "model.onnx")
    assert capfd.readouterr() == ("", "")  # the exporter's chatter
    operators = [node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node]
    assert operators.count("LRN") == num_lrn
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"images": random_images(5)})
    np.testing.assert_allclose(found, torch_runner(other)(random_images(5)), atol=3e-5)


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


def test_engine_build_logs_the_gpus_it_does_not_cover(
    bundle: Bundle, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "infer"):
        engine = build_engine(
            bundle.onnx_path,
            tmp_path / "e",
            checkpoint_sha256="0" * 64,
            crop_px=56,
            max_batch=4,
            precision="fp32",
        )
    assert engine.version in caplog.messages[0] and "loads on" in caplog.messages[0]
    if engine.library == "tensorrt_rtx":
        assert "do not load on Hopper (sm90) and, in fp32, on sm75" in caplog.messages[1]


def test_unparsable_model_is_one_clear_tensorrt_error(tmp_path: Path) -> None:
    node = onnx.helper.make_node("Transpose", ["images"], ["out"], perm=[0, 3, 1, 2])
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [node],
        "g",
        [value("images", onnx.TensorProto.UINT8, ["n", 8, 8, 3])],
        [value("out", onnx.TensorProto.UINT8, ["n", 3, 8, 8])],
    )
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)]), tmp_path / "m")
    with pytest.raises(BuildError, match=r"cannot parse the model: .*UInt8") as raised:
        build_engine(
            tmp_path / "m", tmp_path / "e", checkpoint_sha256="0", crop_px=8, max_batch=2, precision="fp32"
        )
    assert "\n" not in str(raised.value) and not (tmp_path / "e").exists()


def test_builder_is_chosen_by_library_and_gpu() -> None:
    both = {"tensorrt": "11", "tensorrt_rtx": "1.7"}
    assert choose_builder(both, ONE_GPU).library == "tensorrt"
    assert choose_builder(both, ONE_GPU).gpus == ("sm89",)
    assert choose_builder(both, NO_GPU).library == "tensorrt_rtx"
    with pytest.raises(UserError, match=r"no NVIDIA driver.*alexnet\[rtx\]"):
        choose_builder({"tensorrt": "11"}, NO_GPU)
    with pytest.raises(UserError, match=r"pip install 'alexnet\[trt\]'"):
        choose_builder({}, ONE_GPU)
    with pytest.raises(UserError, match=r"pip install 'alexnet\[rtx\]'"):
        choose_builder({}, NO_GPU)
    assert profile_batches(1) == (1, 1, 1)


@pytest.mark.parametrize(
    ("change", "words"),
    [(2e-3, r"a probability differs by .*, more than 0\.0001"), (10.0, "top-1 agreement")],
)
def test_export_that_differs_is_not_shipped(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: float, words: str
) -> None:
    def alter(checkpoint: Checkpoint, path: Path, *, precision: str) -> None:
        model = onnx.load(exported(base).onnx_path)
        (bias,) = (t for t in model.graph.initializer if t.name.endswith("fc8.bias"))
        values = onnx.numpy_helper.to_array(bias).copy()
        values[::2] += change
        bias.CopyFrom(onnx.numpy_helper.from_array(values, bias.name))
        onnx.save(model, path)

    monkeypatch.setattr(infer.export.pipeline, "export_onnx", alter)
    out = tmp_path / "export" / "onnx-fp32"
    with pytest.raises(GateError, match=words) as raised:
        export_model(checkpoint_folder(base), "onnx", out=out)
    assert raised.value.exit_code == 4
    assert list(out.parent.iterdir()) == []


def test_gate_needs_images_of_the_same_classes(base: Path, tmp_path: Path) -> None:
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


@pytest.mark.parametrize("max_batch", [0, 4097])
def test_max_batch_has_bounds(base: Path, max_batch: int) -> None:
    with pytest.raises(UserError, match="from 1 to 4096"):
        export_model(checkpoint_folder(base), "onnx", max_batch=max_batch)


def test_onnx_bundle_with_a_max_batch_of_1(base: Path, tmp_path: Path) -> None:
    bundle = export_model(checkpoint_folder(base), "onnx", max_batch=1, out=tmp_path / "one")
    assert load_bundle(tmp_path / "one") == bundle
    assert bundle.engine_path is None and sorted(p.name for p in bundle.folder.iterdir()) == [
        "bundle.json",
        "model.cpu.onnx",
        "model.onnx",
    ]


@pytest.mark.gpu
def test_engine_was_gated_on_this_gpu(bundle: Bundle) -> None:
    gate = bundle.manifest.report
    assert gate is not None and gate.engine is not None, gate and gate.engine_not_run
    assert gate.engine.max_probability_difference <= 1e-4


def test_exporter_reports_real_warnings(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import warnings

    real = torch.onnx.export

    def warn(*args: object, **kwargs: object) -> object:
        warnings.warn("this may be wrong", UserWarning, stacklevel=1)
        warnings.warn("old spelling", DeprecationWarning, stacklevel=1)
        return real(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(torch.onnx, "export", warn)
    export_onnx(load_checkpoint(checkpoint_folder(base, "owt")), tmp_path / "m.onnx")
    messages = [r.getMessage() for r in caplog.records if r.name == "infer"]
    assert messages == ["ONNX export: this may be wrong"]
