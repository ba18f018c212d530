"""The filters of the first convolution: their picture, and where an ONNX file has them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import helper, numpy_helper

from infer.report.filters import filter_grid, onnx_filters


def test_each_filter_is_scaled_by_itself() -> None:
    filters_KHW3 = np.zeros((17, 22, 22, 3), dtype=np.float32)
    filters_KHW3[0, 0, 0] = (-1, 0, 1)
    filters_KHW3[16, 0, 0] = (0, 50, 100)
    grid = filter_grid(filters_KHW3)
    assert grid.shape == (2 * 44 + 3, 16 * 47 - 3, 3), "16 in a row, twice enlarged, 3 pixels apart"
    assert grid[0, 0].tolist() == grid[1, 1].tolist() == [0, 128, 255] and grid[2, 2].tolist() == [128] * 3
    assert grid[47, 0].tolist() == [0, 128, 255] and grid[46, 0].tolist() == [255] * 3
    assert grid[0, 47].tolist() == [0] * 3, "a filter of equal weights"
    assert grid[90, 47].tolist() == [255] * 3, "no filter"


@pytest.mark.parametrize("stored", ["fp32", "fp16", "int8"])
def test_weights_are_found_in_each_precision(stored: str, tmp_path: Path) -> None:
    weights_K3HW = np.random.default_rng(0).integers(-127, 128, (4, 3, 5, 5))
    scale_K = np.array([1, 2, 4, 8], dtype=np.float32)
    nodes: list[onnx.NodeProto] = []
    values: dict[str, npt.NDArray[Any]] = {}
    if stored == "int8":
        nodes = [helper.make_node("DequantizeLinear", ["q", "scale"], ["w"], axis=0)]
        values = {"q": weights_K3HW.astype(np.int8), "scale": scale_K}
        weights_K3HW = weights_K3HW * scale_K[:, None, None, None].astype(int)
    else:
        values = {"w": weights_K3HW.astype("f4" if stored == "fp32" else "f2")}
    nodes.append(helper.make_node("Conv", ["x", "w"], ["y"]))
    tensors = [numpy_helper.from_array(value, name) for name, value in values.items()]
    onnx.save(helper.make_model(helper.make_graph(nodes, "g", [], [], tensors)), str(tmp_path / "model.onnx"))
    found_KHW3 = onnx_filters(tmp_path / "model.onnx")
    assert np.array_equal(found_KHW3, weights_K3HW.transpose(0, 2, 3, 1))


def test_no_convolution_is_said(tmp_path: Path) -> None:
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [], [])
    onnx.save(helper.make_model(graph), str(tmp_path / "model.onnx"))
    with pytest.raises(LookupError):
        onnx_filters(tmp_path / "model.onnx")
