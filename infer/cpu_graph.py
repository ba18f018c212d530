"""The same network as ONNX Runtime's CPU provider computes it fastest, beside the file for everybody else.

ONNX's own LRN is what TensorRT, CUDA and Triton want, and what ONNX Runtime computes on one core, channel by
channel, on a CPU. There the sum over neighbouring channels is a 1×1 convolution with a band of equal weights,
and the power two square roots; docs/inference-speed.md has what else was tried.

Weights are not written twice: what both files have in common stays in the first one, and the second names its
place there, as ONNX's external data.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

_SHARED_BYTES = 4096
"""Smaller tensors are cheaper to write again than to look for."""


def write_cpu_graph(source: Path, target: Path) -> bool:
    """Write the CPU's form of a model beside it, where there is one.

    Args:
        source: an ONNX file with all its weights inside.
        target: where to write, in the same folder.
    Returns:
        Whether the form differs from the source; if not, nothing is written.
    """
    assert source.parent == target.parent
    model = onnx.load(source, load_external_data=False)
    if not expand_lrn(model):
        return False
    share_weights(model, source)
    onnx.save(model, target)
    return True


def expand_lrn(model: onnx.ModelProto) -> int:
    """Replace every LRN: y = x / (bias + alpha/size · Σ x²)^beta, the sum over `size` channels.

    Returns:
        How many there were.
    Source: ONNX operator LRN; for beta = 0.75, s^0.75 = sqrt(s) · sqrt(sqrt(s)).
    """
    graph = model.graph
    count: int = sum(node.op_type == "LRN" for node in graph.node)
    if not count:
        return 0
    shapes = onnx.shape_inference.infer_shapes(model).graph.value_info
    channels = {
        value.name: value.type.tensor_type.shape.dim[1].dim_value
        for value in shapes
        if len(value.type.tensor_type.shape.dim) == 4
    }
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        if node.op_type == "LRN":
            more, constants = _lrn_nodes(node, channels[node.input[0]])
            nodes += more
            graph.initializer.extend(constants)
        else:
            nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
    onnx.checker.check_model(model, full_check=True)
    return count


def band_names(model: onnx.ModelProto) -> list[str]:
    """The names of the convolutions that `expand_lrn` made; their sums of squares are not for 8 bits."""
    return [node.name for node in model.graph.node if node.name.endswith(_BAND)]


_BAND = "_window_sum"


def _lrn_nodes(node: onnx.NodeProto, channels: int) -> tuple[list[onnx.NodeProto], list[TensorProto]]:
    given = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    size, alpha = int(given["size"]), float(given.get("alpha", 1e-4))
    beta, bias = float(given.get("beta", 0.75)), float(given.get("bias", 1.0))
    (x,), (y,) = node.input, node.output
    constants: list[TensorProto] = []
    nodes: list[onnx.NodeProto] = []

    def constant(name: str, values: Any) -> str:
        array: NDArray[np.float32] = np.asarray(values, np.float32)
        constants.append(numpy_helper.from_array(array, f"{y}_{name}"))
        return f"{y}_{name}"

    def add(operator: str, inputs: list[str], name: str, **attributes: Any) -> str:
        output = y if not name else f"{y}{name}"
        nodes.append(helper.make_node(operator, inputs, [output], name=f"{y}{name or '_out'}", **attributes))
        return output

    distance = np.subtract.outer(np.arange(channels), np.arange(channels))
    # ONNX sums from floor((size - 1)/2) channels below to ceil((size - 1)/2) above.
    band = (distance <= (size - 1) // 2) & (-distance <= size // 2)
    weight = constant("band", alpha / size * band[:, :, None, None])
    square = add("Mul", [x, x], "_square")
    offset = constant("bias", np.full(channels, bias))
    scale = add("Conv", [square, weight, offset], _BAND, kernel_shape=[1, 1])
    if beta == 0.75:
        root = add("Sqrt", [scale], "_sqrt")
        power = add("Mul", [root, add("Sqrt", [root], "_sqrt_sqrt")], "_power")
    else:
        power = add("Pow", [scale, constant("beta", beta)], "_power")
    add("Div", [x, power], "")
    return nodes, constants


def share_weights(model: onnx.ModelProto, source: Path) -> None:
    """Let large weights that a file has, byte for byte, be read from there: ONNX's external data.

    Args:
        source: a file in the folder that `model` will be saved in.
    """
    content = source.read_bytes()
    for tensor in model.graph.initializer:
        if len(tensor.raw_data) < _SHARED_BYTES or (offset := content.find(tensor.raw_data)) < 0:
            continue
        length = len(tensor.raw_data)
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", source.name), ("offset", str(offset)), ("length", str(length))):
            entry = tensor.external_data.add()
            entry.key, entry.value = key, value
