"""ONNX in float32 to ONNX in 8-bit integers: Q/DQ pairs with scales from real images.

The form is the one that TensorRT parses: symmetric int8 for weights (a scale a channel) and activations, a
pair of its own at each input, and biases in float32. ONNX Runtime runs the same file.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from infer.bundle import INPUT_NAME

QUANTIZED_OPERATORS = ("Conv", "Gemm", "MatMul")
_OPTIONS = {
    "ActivationSymmetric": True,
    "WeightSymmetric": True,
    "DedicatedQDQPair": True,
    "AddQDQPairToWeight": True,
    "QuantizeBias": False,  # an int32 bias is what TensorRT does not parse
}


def quantize_onnx(source: Path, target: Path, batches: Iterable[NDArray[np.uint8]]) -> None:
    """Write `source` quantised to int8, with ranges as the images reach them (min-max).

    Args:
        source: a float32 model as `infer.export_onnx` writes it.
        target: where to write.
        batches: decoded images (n, crop, crop, 3), read once.
    Source: ONNX Runtime, "Quantize ONNX models", static quantisation in the QDQ format.
    """
    from onnxruntime.quantization import (
        CalibrationDataReader,
        CalibrationMethod,
        QuantFormat,
        QuantType,
        quantize_static,
    )
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._batches: Iterator[NDArray[np.uint8]] = iter(batches)

        def get_next(self) -> dict[str, NDArray[np.uint8]] | None:
            images_NHWC = next(self._batches, None)
            return None if images_NHWC is None else {INPUT_NAME: images_NHWC}

    chatter = logging.getLogger()
    level = chatter.level
    chatter.setLevel(logging.ERROR)  # it advises on the root logger to do what was just done
    try:
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            prepared = Path(folder) / "prepared.onnx"
            quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
            quantize_static(
                str(prepared),
                str(target),
                Reader(),
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=list(QUANTIZED_OPERATORS),
                per_channel=True,
                activation_type=QuantType.QInt8,
                weight_type=QuantType.QInt8,
                calibrate_method=CalibrationMethod.MinMax,
                extra_options=_OPTIONS,
            )
    finally:
        chatter.setLevel(level)
    _finish(source, target)


def _finish(source: Path, target: Path) -> None:
    """Leave the logits in float32, and give the file the names and the metadata of its source."""
    model, before = onnx.load(target), onnx.load(source, load_external_data=False)
    _keep_logits(model.graph)
    model.producer_name, model.producer_version = before.producer_name, before.producer_version
    model.doc_string = before.doc_string
    del model.metadata_props[:]
    model.metadata_props.extend(before.metadata_props)
    for node in model.graph.node:
        node.doc_string = ""
        del node.metadata_props[:]
    onnx.save(model, target)
    onnx.checker.check_model(target, full_check=True)


def _keep_logits(graph: Any) -> None:
    # In 256 steps over their whole range, the two best of 1000 logits are too often equal.
    made_by = {name: node for node in graph.node for name in node.output}
    (softmax,) = (node for node in graph.node if node.op_type == "Softmax")
    dequantize = made_by[softmax.input[0]]
    if dequantize.op_type != "DequantizeLinear":
        return
    quantize = made_by[dequantize.input[0]]
    softmax.input[0] = quantize.input[0]
    graph.node.remove(dequantize)
    graph.node.remove(quantize)
