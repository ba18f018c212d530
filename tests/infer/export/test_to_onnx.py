"""The ONNX file: its contract, metadata and operators, and the same probabilities as torch."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from data_pipeline.transforms.preprocessing import Preprocessing
from infer.bundle.load import Bundle
from infer.export.gate import torch_runner
from infer.export.to_onnx import ContractModel, export_onnx
from tests.helpers.infer_samples import CLASSES, captured_once, checkpoint_folder
from train.checkpoints.load import Checkpoint, load_checkpoint

pytestmark = pytest.mark.usefixtures("thin", "once")


@pytest.fixture(scope="module")
def once(bundle: Bundle) -> Iterator[None]:
    """Capture each network once for its exports here; the bundle's own is made before."""
    with captured_once():
        yield


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
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 20)] and model.ir_version == 9
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
    expected = torch_runner(checkpoint)(random_images(n)).probabilities
    assert found.shape == (n, 10) and found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=3e-5)
    assert np.ptp(expected, axis=1).min() > 0.1  # or the comparison would say little


@pytest.mark.slow
@pytest.mark.parametrize(("name", "num_lrn"), [("caffe", 2), ("owt", 0), ("bn", 0)])
def test_other_networks_export_and_agree(
    base: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    name: str,
    num_lrn: int,
) -> None:
    other = load_checkpoint(checkpoint_folder(base, name))
    export_onnx(ContractModel(other), tmp_path / "model.onnx")
    assert capfd.readouterr() == ("", "")  # the exporter's chatter
    assert [r.getMessage() for r in caplog.records if r.name == "infer"] == []
    operators = [node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node]
    assert operators.count("LRN") == num_lrn
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"images": random_images(5)})
    np.testing.assert_allclose(found, torch_runner(other)(random_images(5)).probabilities, atol=3e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("opset", "name", "ir_version"),
    [(17, "owt", 8), (17, "bn", 8), (18, "paper", 8), (19, "paper", 9)],
)
def test_lower_opsets_say_so_and_compute_the_same(
    base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], opset: int, name: str, ir_version: int
) -> None:
    checkpoint = load_checkpoint(checkpoint_folder(base, name))
    export_onnx(ContractModel(checkpoint), tmp_path / "model.onnx", opset=opset)
    assert capfd.readouterr() == ("", "")
    model = onnx.load(tmp_path / "model.onnx")
    assert [(o.domain, o.version) for o in model.opset_import] == [("", opset)]
    assert model.ir_version == ir_version
    assert sum(node.op_type == "LRN" for node in model.graph.node) == (2 if name == "paper" else 0)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    assert session.get_modelmeta().custom_metadata_map["checkpoint_sha256"] == checkpoint.sha256
    (found,) = session.run(None, {"images": random_images(5)})
    np.testing.assert_allclose(found, torch_runner(checkpoint)(random_images(5)).probabilities, atol=3e-5)


@pytest.mark.slow
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
    export_onnx(ContractModel(load_checkpoint(checkpoint_folder(base, "owt"))), tmp_path / "m.onnx")
    messages = [r.getMessage() for r in caplog.records if r.name == "infer"]
    assert messages == ["ONNX export: this may be wrong"]
