"""int8 as ONNX Runtime's CPU provider computes it fastest, where TensorRT wants another form.

Activations are unsigned, since ReLU leaves nothing below zero, and weights signed: what the processors' 8-bit
dot products (VNNI) take. Weights have 7 bits, because processors without those instructions overflow on 8.
The pixels go into the first convolution as they are, and LRN takes its input from the 8-bit values.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from infer.bundle.manifest import INPUT_NAME
from infer.export.cpu_form import LrnForm, expand_lrn, replace_nodes
from infer.export.quantize import Scheme, copy_identity, keep_logits, quantize_graph

_PIXELS = "pixels"
_PIXELS_FLOAT = "pixels_float"
_WHITE = 255

CPU_SCHEME = Scheme(
    operators=("Conv", "Relu", "Gemm"),  # LRN's matrix products stay as they are
    unsigned_activations=True,
    options={"WeightSymmetric": True},
    reduce_range=True,
)


def quantize_for_cpu(source: Path, target: Path, batches: Iterable[NDArray[np.uint8]]) -> None:
    """Write `source` quantised to int8 for ONNX Runtime's CPU provider.

    Args:
        source: a float32 model as `infer.export.to_onnx` writes it.
        target: where to write.
        batches: decoded images (n, crop, crop, 3), read once.
    Source: ONNX Runtime, "Quantize ONNX models", on U8S8 and `reduce_range`.
    """
    model = onnx.load(source)
    forms = expand_lrn(model, channels_last=True)
    fold_normalisation(model)
    folded = target.with_suffix(".folded")
    onnx.save(model, folded)
    try:
        quantize_graph(folded, target, batches, CPU_SCHEME)
    finally:
        folded.unlink()
    quantised = onnx.load(target)
    _take_pixels(quantised)
    for form in forms:
        _take_integers(quantised, form)
    keep_logits(quantised.graph)
    copy_identity(source, quantised)
    onnx.save(quantised, target)
    onnx.checker.check_model(target, full_check=True)


def fold_normalisation(model: onnx.ModelProto) -> None:
    """Let the first convolution take pixels of 0 to 255 and a fourth plane that is 255 throughout.

    Its weights take in the scale, and those of the fourth plane the shift: so the border, where a convolution
    pads with zeros behind the normalisation, stays exact.
    """
    graph = model.graph
    made_by = {name: node for node in graph.node for name in node.output}
    values = {tensor.name: tensor for tensor in graph.initializer}
    stem = next(node for node in graph.node if node.op_type == "Conv")
    shift_node = made_by[stem.input[0]]
    scale_node = made_by[shift_node.input[0]]
    transpose = made_by[scale_node.input[0]]
    cast = made_by[transpose.input[0]]
    kinds = [node.op_type for node in (cast, transpose, scale_node, shift_node)]
    assert kinds == ["Cast", "Transpose", "Mul", "Add"] and cast.input[0] == INPUT_NAME, kinds
    scale, shift = (
        numpy_helper.to_array(values[node.input[1]]).astype(np.float64).reshape(1, -1, 1, 1)
        for node in (scale_node, shift_node)
    )
    weight = numpy_helper.to_array(values[stem.input[1]]).astype(np.float64)
    constant_plane = (weight * shift).sum(1, keepdims=True) / _WHITE
    folded = np.concatenate([weight * scale, constant_plane], axis=1).astype(np.float32)
    side = graph.input[0].type.tensor_type.shape.dim[1].dim_value
    constants: dict[str, NDArray[Any]] = {
        "stem_weight": folded,
        "three_planes": np.array([0, 3 * side, side], np.int64),
        "one_more_plane": np.array([0, 0, 0, 0, side, 0], np.int64),
        "white": np.array(_WHITE, np.uint8),
        "four_planes": np.array([0, 4, side, side], np.int64),
    }
    graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in constants.items())
    # Reshaped, since the runtime would else move the transposition behind the padding, which is slow there.
    steps = [
        helper.make_node("Transpose", [INPUT_NAME], ["planes"], name="planes", perm=[0, 3, 1, 2]),
        helper.make_node("Reshape", ["planes", "three_planes"], ["rows"], name="rows"),
        helper.make_node("Pad", ["rows", "one_more_plane", "white"], ["more_rows"], name="more_rows"),
        helper.make_node("Reshape", ["more_rows", "four_planes"], [_PIXELS], name=_PIXELS),
        helper.make_node("Cast", [_PIXELS], [_PIXELS_FLOAT], name=_PIXELS_FLOAT, to=onnx.TensorProto.FLOAT),
    ]
    stem.input[0], stem.input[1] = _PIXELS_FLOAT, "stem_weight"
    replace_nodes(graph, {cast.name: steps, transpose.name: [], scale_node.name: [], shift_node.name: []})


def _take_pixels(model: onnx.ModelProto) -> None:
    """Pixels are 8-bit values already: no detour over float32."""
    graph = model.graph
    values = {tensor.name: tensor for tensor in graph.initializer}
    (quantize,) = (node for node in graph.node if _PIXELS_FLOAT in node.input)
    assert quantize.op_type == "QuantizeLinear"
    scale, zero = (numpy_helper.to_array(values[name]) for name in quantize.input[1:])
    assert scale == 1 and zero == 0, "the fourth plane spans the whole range"
    cast = next(node for node in graph.node if _PIXELS_FLOAT in node.output)
    _rename(graph, quantize.output[0], _PIXELS)
    replace_nodes(graph, {quantize.name: [], cast.name: []})


def _take_integers(model: onnx.ModelProto, form: LrnForm) -> None:
    """Let an LRN read the 8-bit values q of its input s·q: y = q / ((bias + band·s²·Σq²) · s^(-1/beta))^beta.

    The runtime would otherwise dequantise once for each of its readers.
    """
    graph = model.graph
    values = {tensor.name: tensor for tensor in graph.initializer}
    made_by = {name: node for node in graph.node for name in node.output}
    named = {node.name: node for node in graph.node}
    above = named[form.sum]
    while above.op_type != "DequantizeLinear":
        above = made_by[above.input[0]]
    scale, zero = (numpy_helper.to_array(values[name]) for name in above.input[1:])
    readers = [node.name for node in graph.node if above.output[0] in node.input]
    assert zero == 0 and all(name.startswith(form.prefix) for name in readers), (zero, readers)
    whole = float(scale) ** (-1 / form.beta)
    for name, factor in ((form.sum, whole * float(scale) ** 2), (form.scale, whole)):
        node = named[name]
        place = next(i for i, given in enumerate(node.input) if given in values)
        array = numpy_helper.to_array(values[node.input[place]]).astype(np.float64) * factor
        node.input[place] = f"{name}_constant"  # its own: another LRN may have had the same
        graph.initializer.append(numpy_helper.from_array(array.astype(np.float32), node.input[place]))
    integers = f"{form.prefix}_integers"
    cast = helper.make_node("Cast", [above.input[0]], [integers], name=integers, to=onnx.TensorProto.FLOAT)
    _rename(graph, above.output[0], integers)
    replace_nodes(graph, {above.name: [cast]})


def _rename(graph: Any, old: str, new: str) -> None:
    for node in graph.node:
        for place, name in enumerate(node.input):
            if name == old:
                node.input[place] = new
