"""The form of the model for ONNX Runtime on a CPU: the same numbers, the weights not written twice."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from infer.bundle.load import Bundle
from infer.bundle.manifest import CPU_NAME, INPUT_NAME, ONNX_NAME
from infer.export.cpu_form import expand_lrn, has_shared_weights, write_cpu_graph
from infer.export.quantize_cpu import fold_normalisation, quantize_for_cpu
from infer.export.to_onnx import export_onnx
from infer.export.verify_precision import prove_precision
from tests.helpers.infer_samples import checkpoint_folder
from train.checkpoints.load import load_checkpoint

IMAGES = np.random.default_rng(0).integers(0, 256, (6, 56, 56, 3), dtype=np.uint8)


def probabilities(path: Path | bytes) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    found: np.ndarray[tuple[int, ...], np.dtype[np.float32]] = session.run(None, {INPUT_NAME: IMAGES})[0]
    return found


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("size", "beta"), [(5, 0.75), (4, 0.75), (3, 0.6)])
def test_an_lrn_written_out_is_what_onnx_says(size: int, beta: float, channels_last: bool) -> None:
    """Against the operator's definition; onnx's own reference counts channels by the batch (1.23)."""
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", 9, 4, 3]) for n in ("x", "out")]
    node = helper.make_node("LRN", ["x"], ["y"], name="lrn", size=size, alpha=0.2, beta=beta, bias=1.5)
    relu = helper.make_node("Relu", ["x0"], ["x1"], name="relu")
    node.input[0] = "x1"
    last = helper.make_node("Identity", ["y"], ["out"], name="last")
    values[0].name = "x0"
    graph = helper.make_graph([relu, node, last], "one", [values[0]], [values[1]])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
    x = np.random.default_rng(1).normal(size=(2, 9, 4, 3)).astype(np.float32)
    positive, expected = np.maximum(x, 0), np.empty_like(x)
    for c in range(9):
        near = positive[:, max(0, c - (size - 1) // 2) : c + size // 2 + 1]
        expected[:, c] = positive[:, c] / (1.5 + 0.2 / size * (near**2).sum(1)) ** beta
    assert len(expand_lrn(model, channels_last=channels_last)) == 1
    (found,) = ReferenceEvaluator(model).run(None, {"x0": x})
    assert isinstance(found, np.ndarray)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


def test_a_bundle_has_a_form_for_the_cpu_that_reads_the_others_weights(bundle: Bundle) -> None:
    cpu = bundle.manifest.cpu
    assert cpu is not None and (cpu.file, cpu.reads) == (CPU_NAME, ONNX_NAME)
    assert bundle.cpu_path.stat().st_size < 0.01 * bundle.onnx_path.stat().st_size
    assert not any(node.op_type == "LRN" for node in onnx.load(bundle.cpu_path).graph.node)
    np.testing.assert_allclose(
        probabilities(bundle.cpu_path), probabilities(bundle.onnx_path), rtol=0, atol=1e-6
    )
    report = bundle.manifest.report
    assert report is not None and report.cpu is not None and report.cpu.top1_agreement == 1


def test_a_network_without_lrn_needs_no_form_of_its_own(base: Path, tmp_path: Path) -> None:
    export_onnx(load_checkpoint(checkpoint_folder(base, "owt")), tmp_path / ONNX_NAME)
    assert not write_cpu_graph(tmp_path / ONNX_NAME, tmp_path / CPU_NAME)
    assert not (tmp_path / CPU_NAME).exists()


def test_pixels_go_into_the_first_convolution_as_they_are(bundle: Bundle) -> None:
    """The border, too: the convolution pads with zeros where the normalisation would have made them."""
    model = onnx.load(bundle.onnx_path)
    fold_normalisation(model)
    assert {"Mul", "Add"}.isdisjoint(node.op_type for node in model.graph.node[:6])
    np.testing.assert_allclose(
        probabilities(model.SerializeToString()), probabilities(bundle.onnx_path), rtol=0, atol=2e-6
    )


def test_int8_for_the_cpu_has_unsigned_activations_and_weights_of_7_bits(
    bundle: Bundle, tmp_path: Path
) -> None:
    path = tmp_path / CPU_NAME
    quantize_for_cpu(bundle.onnx_path, path, [IMAGES])
    assert not has_shared_weights(path) and path.stat().st_size < 0.27 * bundle.onnx_path.stat().st_size
    proof = prove_precision(path, "int8")
    assert proof.computed_in["Conv"] == {"int8/uint8": 5} and proof.computed_in["Gemm"] == {"int8/uint8": 3}
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        if tensor.name.endswith("weight_quantized"):
            assert np.abs(onnx.numpy_helper.to_array(tensor)).max() <= 64, tensor.name
    operators = [node.op_type for node in model.graph.node]
    assert operators.index("Conv") > 0 and model.graph.node[0].op_type in ("Transpose", "DequantizeLinear")
    assert "LRN" not in operators and operators.count("Sqrt") == 4
    exact, found = probabilities(bundle.onnx_path), probabilities(path)
    assert (found.argmax(1) == exact.argmax(1)).all() and np.abs(found - exact).max() < 0.1
