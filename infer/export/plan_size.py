"""What precision a TensorRT plan has, by its size: a plan holds each weight once."""

from __future__ import annotations

from pathlib import Path

from data_pipeline.common.errors import GateError
from infer.bundle.manifest import Precision, Proof

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
