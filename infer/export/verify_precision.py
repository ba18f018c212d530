"""What precision a file really has, read from the file and not from the options that made it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx

from data_pipeline.common.errors import GateError
from infer.bundle.manifest import Precision, Proof
from infer.export.cpu_form import is_lrn_sum

_HEAVY = ("Conv", "Gemm", "MatMul")
_WIDE = ("LRN", "Softmax")


def prove_precision(path: Path, precision: Precision) -> Proof:
    """Read a model's tensor types, and hold them against the precision that was asked for.

    fp32: convolutions and matrix products take float32, and nothing is quantised. fp16: they take float16,
    LRN and softmax float32. int8: both their inputs come out of int8, activations
    in a form for CPUs out of uint8, through DequantizeLinear. An LRN's own sum is not looked at.

    Args:
        path: an ONNX file.
        precision: what it should be.
    Returns:
        What was found, for the manifest.
    Raises:
        GateError: it is something else.
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
    proof = Proof(
        computed_in={name: dict(counts) for name, counts in sorted(computed.items())},
        num_values=dict(weights),
        num_quantize=operators["QuantizeLinear"],
        num_dequantize=operators["DequantizeLinear"],
        opset=next((entry.version for entry in model.opset_import if not entry.domain), None),
        ir_version=model.ir_version,
    )
    heavy = {"fp32": {"float"}, "fp16": {"float16"}, "int8": {"int8", "int8/uint8"}}[precision]
    wanted = {name: heavy if name in _HEAVY else {"float"} for name in computed}
    wrong = [
        f"{name} in {', '.join(found)} instead of {min(wanted[name])}"
        for name, found in proof.computed_in.items()
        if not set(found) <= wanted[name]
    ]
    if not set(computed) & set(_HEAVY):
        wrong.append("no convolution and no matrix product")
    if (proof.num_dequantize > 0) != (precision == "int8"):
        wrong.append(f"{proof.num_dequantize} DequantizeLinear nodes")
    if wrong:
        raise GateError(f"gate: {path.name} is not {precision} ({'; '.join(wrong)}); nothing was shipped")
    return proof


def _type_of(name: str, types: dict[str, int], made_by: dict[str, onnx.NodeProto]) -> str:
    """The type a value is computed in: of what is dequantised, if it is."""
    node = made_by.get(name)
    if node is not None and node.op_type == "DequantizeLinear":
        name = node.input[0]
    return str(onnx.TensorProto.DataType.Name(types.get(name, 0))).lower()


_BYTES_PER_WEIGHT: dict[Precision, int] = {"fp32": 4, "fp16": 2, "int8": 1}


# Kernels, tables and padding beside the weights; what is left out for being zero or folded away.
_MOST, _LEAST = 1.1, 0.9


_INT8_MOST = 1.4  # biases and scales stay in float32


_OVERHEAD_BYTES = 12 * 2**20


def check_plan_size(path: Path, proof: Proof, precision: Precision) -> None:
    """Hold a plan's size against its weights: another precision makes it twice or half as large.

    Args:
        path: the plan.
        proof: of the ONNX file that it was built from; says how many weights there are.
        precision: what it should be.
    Raises:
        GateError: it is too large or too small for the precision.
    """
    nominal = _BYTES_PER_WEIGHT[precision] * sum(proof.num_values.values())
    most = nominal * (_INT8_MOST if precision == "int8" else _MOST) + _OVERHEAD_BYTES
    size = path.stat().st_size
    if not nominal * _LEAST <= size <= most:
        what = "much" if size > most else "little"
        raise GateError(
            f"gate: {path.name} has {size / 1e6:.0f} MB, too {what} for weights in {precision} "
            f"({nominal * _LEAST / 1e6:.0f} to {most / 1e6:.0f} MB); nothing was shipped"
        )
