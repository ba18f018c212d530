"""The same network as ONNX Runtime's CPU provider computes it fastest, beside the file for everybody else.

ONNX's own LRN is what TensorRT, CUDA and Triton want, and what ONNX Runtime computes on one core, channel by
channel, on a CPU. There the sum over neighbouring channels is a 1×1 convolution with a band of equal weights,
and the power two square roots; docs/inference-speed.md has what else was tried.

Weights are not written twice: what both files have in common stays in the first one, and the second names its
place there, as ONNX's external data.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

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
    onnx.checker.check_model(target, full_check=True)
    return True


class LrnForm(NamedTuple):
    """Where an LRN went: how its nodes' names begin, those that weigh and add; its power."""

    prefix: str
    sum: str
    scale: str
    beta: float


def expand_lrn(model: onnx.ModelProto, *, channels_last: bool = False) -> list[LrnForm]:
    """Replace every LRN: y = x / (bias + alpha/size · Σ x²)^beta, the sum over `size` channels.

    Args:
        channels_last: the sum as a matrix product over the last axis, in a transposition that the runtime
            cancels where its neighbours are channels-last, too; else as a 1×1 convolution.
    Returns:
        One for each.
    Source: ONNX operator LRN; for beta = 0.75, s^0.75 = sqrt(s) · sqrt(sqrt(s)).
    """
    shapes = onnx.shape_inference.infer_shapes(model).graph.value_info
    channels = {
        value.name: value.type.tensor_type.shape.dim[1].dim_value
        for value in shapes
        if len(value.type.tensor_type.shape.dim) == 4
    }
    found = []
    for node in [node for node in model.graph.node if node.op_type == "LRN"]:
        form, nodes, constants = _lrn_nodes(node, channels[node.input[0]], channels_last)
        model.graph.initializer.extend(constants)
        replace_nodes(model.graph, {node.name: nodes})
        found.append(form)
    return found


def replace_nodes(graph: Any, by_name: dict[str, list[onnx.NodeProto]]) -> None:
    """Put other nodes in the place of some."""
    nodes = [new for node in graph.node for new in by_name.get(node.name, [node])]
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(copies)


def _lrn_nodes(
    node: onnx.NodeProto, channels: int, channels_last: bool
) -> tuple[LrnForm, list[onnx.NodeProto], list[TensorProto]]:
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
        output = y if name == LAST else f"{y}_{name}"
        nodes.append(helper.make_node(operator, inputs, [output], name=f"{y}_{name}", **attributes))
        return output

    distance = np.subtract.outer(np.arange(channels), np.arange(channels))
    # ONNX sums from floor((size - 1)/2) channels below to ceil((size - 1)/2) above.
    band = alpha / size * ((distance <= (size - 1) // 2) & (-distance <= size // 2))
    if channels_last:
        x = add("Transpose", [x], "nhwc", perm=[0, 2, 3, 1])
        weight, offset = constant("band", band.T), constant("bias", bias)
        total = add("MatMul", [add("Mul", [x, x], "square"), weight], SUM)
        scale = add("Add", [total, offset], SCALE)
    else:
        weight, offset = constant("band", band[:, :, None, None]), constant("bias", np.full(channels, bias))
        square = add("Mul", [x, x], "square")
        scale = add("Conv", [square, weight, offset], SUM, kernel_shape=[1, 1])
    if beta == 0.75:
        root = add("Sqrt", [scale], "root")
        power = add("Mul", [root, add("Sqrt", [root], "root_of_root")], "power")
    else:
        power = add("Pow", [scale, constant("beta", beta)], "power")
    if channels_last:
        add("Transpose", [add("Div", [x, power], "quotient")], LAST, perm=[0, 3, 1, 2])
    else:
        add("Div", [x, power], LAST)
    return LrnForm(y, f"{y}_{SUM}", f"{y}_{SCALE}", beta), nodes, constants


def is_of_lrn(node: onnx.NodeProto) -> bool:
    """Whether a convolution or matrix product is an LRN's sum, which is in float32 in every precision."""
    return bool(node.name.endswith(SUM))


SUM, SCALE, LAST = "sum_of_squares", "scale", "out"


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


def has_shared_weights(path: Path) -> bool:
    """Whether a file reads weights from another one."""
    model = onnx.load(path, load_external_data=False)
    return any(tensor.data_location == TensorProto.EXTERNAL for tensor in model.graph.initializer)
