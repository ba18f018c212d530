"""The form of the model for ONNX Runtime on a CPU: the same numbers, the weights not written twice."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from infer.bundle.load import Bundle
from infer.bundle.schema import CPU_NAME, INPUT_NAME, ONNX_NAME
from infer.export.cpu_form import BandedLrn, has_shared_weights
from infer.export.quantize import quantize_for_cpu
from infer.export.to_onnx import ContractModel, export_for_cpu, export_for_int8_cpu
from infer.export.verify_precision import check_precision
from tests.helpers.infer_samples import captured_once, checkpoint_folder, export_model
from train.checkpoints.load import load_checkpoint
from train.models.lrn import LocalResponseNorm

IMAGES = np.random.default_rng(0).integers(0, 256, (6, 56, 56, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def once(base: Path) -> Iterator[None]:
    """Capture each form of the network once for its exports here: whole and sharing, of either opset."""
    with captured_once():
        yield


@pytest.fixture(scope="module")
def bundle(base: Path, once: None) -> Bundle:
    """An export of the network as published: sizes and differences below are those of its channels."""
    return export_model(checkpoint_folder(base), "onnx", max_batch=8)


def probabilities(model: Path | bytes) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    found: np.ndarray[tuple[int, ...], np.dtype[np.float32]] = session.run(None, {INPUT_NAME: IMAGES})[0]
    return found


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("size", "beta"), [(5, 0.75), (7, 0.75), (3, 0.6)])
def test_banded_lrn_is_what_onnx_defines(size: int, beta: float, channels_last: bool) -> None:
    norm = LocalResponseNorm(size, alpha=0.2, beta=beta, k=1.5)
    x = np.maximum(np.random.default_rng(1).normal(size=(2, 9, 4, 3)), 0).astype(np.float32)
    expected = np.empty_like(x)
    for c in range(9):
        near = x[:, max(0, c - size // 2) : c + size // 2 + 1]
        expected[:, c] = x[:, c] / (1.5 + 0.2 / size * (near**2).sum(1)) ** beta
    found = BandedLrn(norm, channels=9, channels_last=channels_last)(torch.from_numpy(x))
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-6)
    np.testing.assert_allclose(norm(torch.from_numpy(x)).numpy(), expected, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_cpu_form_shares_the_weights_of_the_model(bundle: Bundle) -> None:
    cpu = bundle.manifest.cpu
    assert cpu is not None and (cpu.file, cpu.reads) == (CPU_NAME, ONNX_NAME)
    bands_bytes = 4 * (96**2 + 256**2)  # of the two normalisations: all that it does not share
    assert bundle.cpu_path.stat().st_size < bands_bytes + 40_000 < 0.03 * bundle.onnx_path.stat().st_size
    assert not any(node.op_type == "LRN" for node in onnx.load(bundle.cpu_path).graph.node)
    np.testing.assert_allclose(
        probabilities(bundle.cpu_path), probabilities(bundle.onnx_path), rtol=0, atol=1e-6
    )
    report = bundle.manifest.report
    assert report is not None and report.cpu is not None and report.cpu.top1_agreement == 1
    with pytest.raises(Exception, match=r"model\.onnx"):  # as the documentation says, and what it names
        probabilities(bundle.cpu_path.read_bytes())


@pytest.mark.slow
def test_one_file_has_all_weights_and_loads_from_bytes(bundle: Bundle, base: Path, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(checkpoint_folder(base))
    export_for_cpu(ContractModel(checkpoint), tmp_path / CPU_NAME, None)
    assert [path.name for path in tmp_path.iterdir()] == [CPU_NAME]
    assert not has_shared_weights(tmp_path / CPU_NAME)
    whole, shared = probabilities((tmp_path / CPU_NAME).read_bytes()), probabilities(bundle.cpu_path)
    np.testing.assert_array_equal(whole, shared)


@pytest.mark.slow
def test_cpu_form_is_not_made_without_lrn(base: Path, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(checkpoint_folder(base, "owt"))
    export_for_cpu(ContractModel(checkpoint), tmp_path / CPU_NAME, tmp_path / ONNX_NAME)
    assert not (tmp_path / CPU_NAME).exists()


@pytest.fixture(scope="module")
def for_int8(
    bundle: Bundle, base: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[float]]:
    """The float32 model that int8 for a CPU starts from, and the exponents of its LRN layers."""
    path = tmp_path_factory.mktemp("for-int8") / "float32.onnx"
    return path, export_for_int8_cpu(ContractModel(load_checkpoint(checkpoint_folder(base))), path)


@pytest.mark.slow
def test_folded_normalisation_feeds_raw_pixels_to_conv1(
    bundle: Bundle, for_int8: tuple[Path, list[float]]
) -> None:
    """The border, too: the convolution pads with zeros where the normalisation would have made them."""
    model = onnx.load(for_int8[0])
    assert {"Mul", "Add"}.isdisjoint(node.op_type for node in model.graph.node[:6])
    np.testing.assert_allclose(probabilities(for_int8[0]), probabilities(bundle.onnx_path), rtol=0, atol=2e-6)


@pytest.mark.slow
def test_padding_of_int8_form_survives_opset_17(
    for_int8: tuple[Path, list[float]], base: Path, tmp_path: Path
) -> None:
    """ONNX's converter has no way back for `Pad`."""
    path = tmp_path / "float32.onnx"
    export_for_int8_cpu(ContractModel(load_checkpoint(checkpoint_folder(base))), path, opset=17)
    model = onnx.load(path)
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 17)] and model.ir_version == 8
    assert [node.domain for node in model.graph.node if node.op_type == "Pad"] == [""]
    np.testing.assert_allclose(probabilities(path), probabilities(for_int8[0]), rtol=0, atol=1e-6)


@pytest.mark.slow
def test_int8_cpu_form_has_uint8_activations_and_7_bit_weights(
    bundle: Bundle, for_int8: tuple[Path, list[float]], tmp_path: Path
) -> None:
    path = tmp_path / CPU_NAME
    source, betas = for_int8
    assert betas == [0.75, 0.75]
    quantize_for_cpu(source, path, [IMAGES], betas)
    assert not has_shared_weights(path) and path.stat().st_size < 0.31 * bundle.onnx_path.stat().st_size
    check = check_precision(path, "int8")
    assert check.computed_in["Conv"] == {"int8/uint8": 5} and check.computed_in["Gemm"] == {"int8/uint8": 3}
    model = onnx.load(path)
    # ONNX Runtime's quantiser adds sets of operators that an older one does not know.
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 20)] and model.ir_version == 9
    for tensor in model.graph.initializer:
        if tensor.name.endswith("weight_quantized"):
            assert np.abs(onnx.numpy_helper.to_array(tensor)).max() <= 64, tensor.name
    operators = [node.op_type for node in model.graph.node]
    assert operators.index("Conv") > 0 and model.graph.node[0].op_type in ("Transpose", "DequantizeLinear")
    assert "LRN" not in operators and operators.count("Sqrt") == 4
    exact, found = probabilities(bundle.onnx_path), probabilities(path)
    assert (found.argmax(1) == exact.argmax(1)).all() and np.abs(found - exact).max() < 0.1
