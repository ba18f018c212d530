"""Features as a second output: the checkpoint's own activations, in every file, within the gate's limits."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import msgspec
import numpy as np
import onnxruntime
import pytest
import torch

from data_pipeline.common.errors import GateError
from infer.bundle.describe import describe_export
from infer.bundle.gate_report import LIMITS
from infer.bundle.load import Bundle
from infer.bundle.schema import Precision, TensorSpec
from infer.export.compare import feature_difference
from infer.export.rebuild import rebuild_engine
from infer.export.to_onnx import ContractModel
from infer.export.triton import config_text
from infer.runtime.onnx import OnnxBackend
from tests.helpers.infer_samples import checkpoint_folder, data_folder, tiny_manifest
from train.checkpoints.load import load_checkpoint
from train.models.alexnet import NETWORKS, Normalize

IMAGES = np.random.default_rng(0).integers(0, 256, (5, 56, 56, 3), dtype=np.uint8)

pytestmark = pytest.mark.usefixtures("thin")


@pytest.mark.slow
def test_features_are_the_checkpoints_activations(featured: Bundle, base: Path) -> None:
    checkpoint = load_checkpoint(checkpoint_folder(base, "paper", ["model.hidden_units=64"]))
    network = checkpoint.make_model()
    seen: list[torch.Tensor] = []
    network.classifier.get_submodule("relu7").register_forward_hook(
        lambda *call: seen.append(call[2].clone())
    )
    with torch.inference_mode():
        network(Normalize(checkpoint.preprocessing)(torch.from_numpy(IMAGES)))
    largest = float(seen[0].max())
    assert largest > 0.1 and float((seen[0] == 0).float().mean()) > 0.1, "behind the ReLU"
    for path in (featured.onnx_path, featured.cpu_path):
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        assert [one.name for one in session.get_outputs()] == ["probabilities", "fc7"]
        _, features = session.run(None, {"images": IMAGES})
        assert features.dtype == np.float32 and features.shape == (5, 64)
        np.testing.assert_allclose(features, seen[0].numpy(), atol=1e-5 * largest)
    assert featured.cpu_path != featured.onnx_path


@pytest.mark.slow
def test_gate_states_the_difference_of_features(featured: Bundle) -> None:
    manifest = featured.manifest
    assert (manifest.feature_layer, manifest.num_features) == ("fc7", 64)
    assert manifest.report is not None and manifest.report.cpu is not None
    for found in (manifest.report.onnx, manifest.report.cpu):
        assert found.max_feature_difference is not None and 0 < found.max_feature_difference < 1e-5
    text = "\n".join(describe_export(featured))
    assert "features: 64 of fc7, a second output" in text and "in model.cpu.onnx; at most 0.0001" in text
    config = config_text(manifest, "onnx")
    assert config.count("TYPE_FP32") == 2 and 'name: "fc7"' in config and "dims: [ 64 ]" in config


@pytest.mark.gpu
def test_features_on_a_gpu_are_those_of_the_cpu(featured: Bundle, base: Path, tmp_path: Path) -> None:
    with closing(OnnxBackend(featured, "cpu")) as cpu, closing(OnnxBackend(featured, "cuda")) as cuda:
        expected, found = (backend.run(IMAGES, features=True).features for backend in (cpu, cuda))
    assert expected is not None and found is not None
    np.testing.assert_allclose(found, expected, atol=1e-4 * expected.max())
    rebuild = rebuild_engine(featured, out=tmp_path / "trt", data=data_folder(base)).manifest.rebuild
    if rebuild is None or rebuild.agreement is None:
        pytest.skip("no engine runs here")
    assert rebuild.agreement.max_feature_difference is not None


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "limit"), [("fp32", 1e-4), ("fp16", 1e-2), ("int8", 0.25)])
def test_features_have_a_limit_for_each_precision(
    featured: Bundle, precision: Precision, limit: float
) -> None:
    assert featured.manifest.report is not None
    for share, beyond in ((limit * 0.99, []), (limit * 1.01, ["a feature differs by"])):
        found = msgspec.structs.replace(featured.manifest.report.onnx, max_feature_difference=share)
        phrases = found.beyond(LIMITS[precision], featured.manifest.report.checkpoint_accuracy)
        assert [phrase[:20] for phrase in phrases] == beyond


def test_difference_is_a_share_of_the_largest_feature() -> None:
    assert feature_difference(None, None) is None
    expected = np.array([[0.0, 4.0], [1.0, 2.0]], np.float32)
    shift = np.array([[0.25], [0.5]], np.float32)
    assert feature_difference(expected, expected - shift) == 0.125
    with pytest.raises(GateError, match="features that are not finite"):
        feature_difference(expected, np.full_like(expected, np.nan))
    dead = np.zeros((2, 2), np.float32)
    with pytest.raises(GateError, match="every feature of the checkpoint is 0"):
        feature_difference(dead, dead)


@pytest.mark.slow
def test_norm_that_ends_a_layer_stays_in_its_features(base: Path) -> None:
    settings = ("model.hidden_units=16", "model.norm=bn_after_relu", "model.hidden_norm=true")
    checkpoint = load_checkpoint(checkpoint_folder(base, "paper", settings))
    pixels, pool5 = torch.from_numpy(IMAGES), 4 * NETWORKS["paper"].channels[-1]
    network = checkpoint.make_model()
    with torch.inference_mode():
        inputs = Normalize(checkpoint.preprocessing)(pixels)
        for layer, width in (("fc7", 16), ("fc6", 16), ("pool5", pool5)):
            logits, expected = network.forward_features(inputs, layer)  # type: ignore[arg-type]
            probabilities, found = ContractModel(checkpoint, features=layer).eval()(pixels)  # type: ignore[arg-type]
            assert found.shape == (5, width) and expected.std() > 0.01
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(probabilities, torch.softmax(logits, 1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["fc9", "fc7"])
def test_manifest_knows_only_outputs_that_are_features(name: str) -> None:
    probabilities = tiny_manifest().outputs
    odd = TensorSpec(name=name, dtype="float32", shape=("batch", "length"))
    with pytest.raises(ValueError, match="no layer's features"):
        tiny_manifest(outputs=(*probabilities, odd))
    whole = TensorSpec(name="fc7", dtype="float32", shape=("batch", 4))
    with pytest.raises(ValueError, match="the gate's report and the outputs contradict each other"):
        tiny_manifest(outputs=(*probabilities, whole))
