"""ONNX in float32 to ONNX in 8-bit integers: Q/DQ pairs with scales from real images.

The form is the one that TensorRT parses: symmetric int8 for weights (a scale a channel) and activations, a
pair of its own at each input, and biases in float32. ONNX Runtime runs the same file.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray

from infer.bundle.manifest import INPUT_NAME


class Scheme(NamedTuple):
    """How a graph is quantised.

    Args:
        operators: which kinds.
        unsigned_activations: uint8 with a zero point, in place of int8 around zero.
        options: ONNX Runtime's extra options.
        reduce_range: weights of 7 bits, for processors whose 8-bit products overflow.
    """

    operators: tuple[str, ...]
    unsigned_activations: bool
    options: dict[str, bool]
    reduce_range: bool = False


TENSORRT_SCHEME = Scheme(
    operators=("Conv", "Gemm", "MatMul"),
    unsigned_activations=False,
    options={
        "ActivationSymmetric": True,
        "WeightSymmetric": True,
        "DedicatedQDQPair": True,
        "AddQDQPairToWeight": True,
        "QuantizeBias": False,  # an int32 bias is what TensorRT does not parse
    },
)


def quantize_onnx(source: Path, target: Path, batches: Iterable[NDArray[np.uint8]]) -> None:
    """Write `source` quantised to int8, with ranges as the images reach them (min-max).

    Args:
        source: a float32 model as `infer.export.to_onnx` writes it.
        target: where to write.
        batches: decoded images (n, crop, crop, 3), read once.
    """
    quantize_graph(source, target, batches, TENSORRT_SCHEME)
    model = onnx.load(target)
    keep_logits(model.graph)
    copy_identity(source, model)
    onnx.save(model, target)
    onnx.checker.check_model(target, full_check=True)


def quantize_graph(source: Path, target: Path, batches: Iterable[NDArray[np.uint8]], scheme: Scheme) -> None:
    """Static quantisation in the Q/DQ format, a scale for each channel of a weight.

    Args:
        source, target, batches: as `quantize_onnx`.
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
                op_types_to_quantize=list(scheme.operators),
                per_channel=True,
                activation_type=QuantType.QUInt8 if scheme.unsigned_activations else QuantType.QInt8,
                weight_type=QuantType.QInt8,
                calibrate_method=CalibrationMethod.MinMax,
                reduce_range=scheme.reduce_range,
                extra_options=dict(scheme.options),
            )
    finally:
        chatter.setLevel(level)


def copy_identity(source: Path, model: onnx.ModelProto) -> None:
    """Give a model the names and the metadata of the file that it was made from, and take out notes."""
    before = onnx.load(source, load_external_data=False)
    model.producer_name, model.producer_version = before.producer_name, before.producer_version
    model.doc_string = before.doc_string
    del model.metadata_props[:]
    model.metadata_props.extend(before.metadata_props)
    for node in model.graph.node:
        node.doc_string = ""
        del node.metadata_props[:]


def keep_logits(graph: Any) -> None:
    """Leave the logits in float32."""
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
