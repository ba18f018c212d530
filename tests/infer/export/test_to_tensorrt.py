"""TensorRT builds: which library builds for which GPUs, and clear errors where none can."""

from __future__ import annotations

import logging
from pathlib import Path

import onnx
import pytest

from data_pipeline.common.errors import UserError
from infer.bundle.load import Bundle
from infer.export.options import EngineOptions, choose_builder, profile_batches
from infer.export.to_tensorrt import BuildError, build_engine
from infer.runtime.cuda import Gpu, GpuScan
from tests.helpers.infer_samples import tiny_manifest

NO_GPU = GpuScan((), "no NVIDIA driver")


ONE_GPU = GpuScan((Gpu("NVIDIA L4", "sm89"),), None)


@pytest.mark.slow
def test_engine_build_logs_the_gpus_it_does_not_cover(
    featured: Bundle, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "infer"):
        engine = build_engine(featured.onnx_path, tmp_path / "e", tiny_manifest(), 4, EngineOptions())
    assert b"fc7" in (tmp_path / "e").read_bytes(), "its second output"
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
        build_engine(tmp_path / "m", tmp_path / "e", tiny_manifest(), 2, EngineOptions())
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
