"""Quantise a float32 ONNX model to 8-bit integers: Q/DQ pairs with scales from real images.

Two forms. TensorRT parses symmetric int8 for weights (a scale a channel) and activations, a pair of its own
at each input, and biases in float32; ONNX Runtime runs that file, too. ONNX Runtime's CPU provider is fastest
with unsigned activations, since ReLU leaves nothing below zero, and signed weights: what the processors'
8-bit dot products (VNNI) take. Those weights have 7 bits, because processors without VNNI overflow on 8.

Source: ONNX Runtime, "Quantize ONNX models": the QDQ format, U8S8 and `reduce_range`.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_static,
)
from onnxruntime.quantization.shape_inference import quant_pre_process

from infer.bundle.schema import INPUT_NAME
from infer.export.cpu_form import is_lrn_sum
from infer.export.to_onnx import declare_least, strip_notes


def quantize_for_tensorrt(source: Path, target: Path, batches: Iterable[NDArray[np.uint8]]) -> None:
    """Write a model quantised to int8 as TensorRT parses it.

    Args:
        source: a float32 model as `infer.export.to_onnx.export_onnx` writes it.
        target: where to write.
        batches: decoded images (n, crop, crop, 3), read once; the smallest and largest values set the ranges.
    """
    _quantize(
        source,
        target,
        batches,
        op_types_to_quantize=["Conv", "Gemm", "MatMul"],
        activation_type=QuantType.QInt8,
        extra_options={
            "ActivationSymmetric": True,
            "WeightSymmetric": True,
            "DedicatedQDQPair": True,
            "AddQDQPairToWeight": True,
            "QuantizeBias": False,  # TensorRT does not parse an int32 bias
            # NVIDIA's advice: the inputs of products alone. What ReLU is about to cut off would set the range
            "OpTypesToExcludeOutputQuantization": ["Conv", "Gemm", "MatMul"],
        },
    )
    _save(onnx.load(target), target, source)


def quantize_for_cpu(
    source: Path, target: Path, batches: Iterable[NDArray[np.uint8]], lrn_betas: Sequence[float]
) -> None:
    """Write a model quantised to int8 as ONNX Runtime's CPU provider computes it fastest; logits in float32.

    Args:
        source: a float32 model as `infer.export.to_onnx.export_for_int8_cpu` writes it.
        target, batches: as in `quantize_for_tensorrt`.
        lrn_betas: exponent of each LRN, as the export returned them.
    """
    _quantize(
        source,
        target,
        batches,
        op_types_to_quantize=["Conv", "Relu", "Gemm"],  # LRN's matrix products stay in float32
        activation_type=QuantType.QUInt8,
        reduce_range=True,
        extra_options={"WeightSymmetric": True},
    )
    model = onnx.load(target)
    _take_pixels(model.graph)
    _take_integers(model.graph, lrn_betas)
    _keep_logits(model.graph)
    _save(model, target, source)


def _quantize(source: Path, target: Path, batches: Iterable[NDArray[np.uint8]], **options: Any) -> None:
    feeds = ({INPUT_NAME: images_NHWC} for images_NHWC in batches)

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def get_next(self) -> dict[str, NDArray[np.uint8]] | None:
            return next(feeds, None)

    root_logger = logging.getLogger()
    level = root_logger.level
    root_logger.setLevel(logging.ERROR)  # ONNX Runtime advises there to do what was just done
    try:
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            prepared = Path(folder) / "prepared.onnx"
            quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
            quantize_static(
                str(prepared),
                str(target),
                Reader(),
                quant_format=QuantFormat.QDQ,
                per_channel=True,
                weight_type=QuantType.QInt8,
                calibrate_method=CalibrationMethod.MinMax,
                **options,
            )
    finally:
        root_logger.setLevel(level)


def _save(model: onnx.ModelProto, target: Path, source: Path) -> None:
    """Write a quantised model with the names and metadata of its source."""
    strip_notes(model)
    declare_least(model)
    before = onnx.load(source, load_external_data=False)
    model.producer_name, model.producer_version = before.producer_name, before.producer_version
    model.doc_string = before.doc_string
    model.metadata_props.extend(before.metadata_props)
    onnx.save(model, target)
    onnx.checker.check_model(target, full_check=True)


def _keep_logits(graph: Any) -> None:
    """Leave the logits in float32."""
    # In 256 steps over their whole range, the two best of 1000 logits are too often equal.
    made_by = {name: node for node in graph.node for name in node.output}
    (softmax,) = (node for node in graph.node if node.op_type == "Softmax")
    dequantize = made_by[softmax.input[0]]
    quantize = made_by[dequantize.input[0]]
    softmax.input[0] = quantize.input[0]
    graph.node.remove(dequantize)
    graph.node.remove(quantize)


def _take_pixels(graph: Any) -> None:
    """Let the first convolution read the pixels, 8-bit values already, without a detour over float32."""
    values = {tensor.name: tensor for tensor in graph.initializer}
    cast = next(node for node in graph.node if node.op_type == "Cast")
    (quantize,) = (node for node in graph.node if cast.output[0] in node.input)
    (dequantize,) = (node for node in graph.node if quantize.output[0] in node.input)
    scale, zero = (numpy_helper.to_array(values[name]) for name in quantize.input[1:])
    assert scale == 1 and zero == 0, "the fourth plane spans the whole range"
    dequantize.input[0] = cast.input[0]
    graph.node.remove(cast)
    graph.node.remove(quantize)


def _take_integers(graph: Any, lrn_betas: Sequence[float]) -> None:
    """Let each LRN read the 8-bit values q of its input s·q.

    It is y = q / ((bias + band·s²·Σq²) · s^(-1/beta))^beta then. ONNX Runtime would otherwise dequantise the
    input once for each node that reads it.
    """
    values = {tensor.name: tensor for tensor in graph.initializer}
    made_by = {name: node for node in graph.node for name in node.output}
    for total, beta in zip(filter(is_lrn_sum, list(graph.node)), lrn_betas, strict=True):
        dequantize = total
        while dequantize.op_type != "DequantizeLinear":
            dequantize = made_by[dequantize.input[0]]
        scale, zero = (numpy_helper.to_array(values[name]) for name in dequantize.input[1:])
        readers = {node.op_type for node in graph.node if dequantize.output[0] in node.input}
        assert zero == 0 and readers <= {"Mul", "Transpose"}, (zero, readers)
        (add,) = (node for node in graph.node if total.output[0] in node.input)
        whole = float(scale) ** (-1 / beta)
        for node, factor in ((total, whole * float(scale) ** 2), (add, whole)):
            place = next(i for i, name in enumerate(node.input) if name in values)
            array = numpy_helper.to_array(values[node.input[place]]).astype(np.float64) * factor
            # A constant of its own: the LRNs may share the bias.
            name = f"{node.name}.{node.input[place].rpartition('.')[2]}"
            graph.initializer.append(numpy_helper.from_array(array.astype(np.float32), name))
            node.input[place] = name
        dequantize.CopyFrom(
            helper.make_node(
                "Cast", dequantize.input[:1], dequantize.output, dequantize.name, to=onnx.TensorProto.FLOAT
            )
        )
