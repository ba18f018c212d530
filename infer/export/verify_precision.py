"""Read the precision of an ONNX file from the file itself, and not from the options that made it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx

from data_pipeline.common.errors import GateError
from infer.bundle.schema import Precision, PrecisionCheck
from infer.export.cpu_form import is_lrn_sum

_HEAVY = ("Conv", "Gemm", "MatMul")
_WIDE = ("LRN", "Softmax")


def check_precision(path: Path, precision: Precision) -> PrecisionCheck:
    """Compare the tensor types of a model with the precision that was asked for.

    fp32: convolutions and matrix products take float32, and nothing is quantised. fp16: they take float16,
    LRN and softmax float32. int8: both their inputs come out of int8 through DequantizeLinear, activations
    in the form for CPUs out of uint8. The sum of a `BandedLrn` is not counted.

    Args:
        path: an ONNX file.
        precision: the one that it should have.
    Returns:
        The types that were found, for the manifest.
    Raises:
        GateError: the file has another precision.
    """
    model = onnx.shape_inference.infer_shapes(onnx.load(path, load_external_data=False))
    graph = model.graph
    types = {v.name: v.type.tensor_type.elem_type for v in (*graph.input, *graph.value_info, *graph.output)}
    types |= {t.name: t.data_type for t in graph.initializer}
    made_by = {name: node for node in graph.node for name in node.output}
    computed: dict[str, Counter[str]] = {}
    for node in graph.node:
        if node.op_type not in (*_HEAVY, *_WIDE) or is_lrn_sum(node):
            continue
        inputs = node.input[:2] if node.op_type in _HEAVY else node.input[:1]
        found = {_type_of(name, types, made_by) for name in inputs}
        computed.setdefault(node.op_type, Counter())["/".join(sorted(found))] += 1
    weights: Counter[str] = Counter()
    for tensor in graph.initializer:
        count = int(np.prod(tensor.dims, dtype=np.int64))
        weights[onnx.TensorProto.DataType.Name(tensor.data_type).lower()] += count
    operators = Counter(node.op_type for node in graph.node)
    check = PrecisionCheck(
        computed_in={name: dict(counts) for name, counts in sorted(computed.items())},
        num_values=dict(weights),
        num_quantize=operators["QuantizeLinear"],
        num_dequantize=operators["DequantizeLinear"],
        opset=next(entry.version for entry in model.opset_import if not entry.domain),
        ir_version=model.ir_version,
    )
    heavy = {"fp32": {"float"}, "fp16": {"float16"}, "int8": {"int8", "int8/uint8"}}[precision]
    wanted = {name: heavy if name in _HEAVY else {"float"} for name in computed}
    wrong = [
        f"{name} in {', '.join(found)} instead of {min(wanted[name])}"
        for name, found in check.computed_in.items()
        if not set(found) <= wanted[name]
    ]
    if not set(computed) & set(_HEAVY):
        wrong.append("no convolution and no matrix product")
    if (check.num_dequantize > 0) != (precision == "int8"):
        wrong.append(f"{check.num_dequantize} DequantizeLinear nodes")
    if wrong:
        raise GateError(f"gate: {path.name} is not {precision} ({'; '.join(wrong)}); nothing was shipped")
    return check


def _type_of(name: str, types: dict[str, int], made_by: dict[str, onnx.NodeProto]) -> str:
    """The type of a value; of one that comes out of DequantizeLinear, the type that goes in."""
    node = made_by.get(name)
    if node is not None and node.op_type == "DequantizeLinear":
        name = node.input[0]
    return str(onnx.TensorProto.DataType.Name(types.get(name, 0))).lower()
