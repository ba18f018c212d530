"""Options for writing ONNX files."""

from __future__ import annotations

from dataclasses import dataclass

from data_pipeline.common.errors import UserError
from infer.bundle.schema import FeatureLayer

DEFAULT_OPSET = 20
MIN_OPSET, MAX_OPSET = 17, 20
EXPORTER_MIN_OPSET = 18
"""The lowest that torch's exporter writes; below, ONNX's version converter takes over."""


@dataclass(frozen=True)
class OnnxOptions:
    """Options for writing the ONNX files of an export.

    Attributes:
        opset: version of ONNX's operators; older runtimes need a lower one: see `infer.bundle.onnx_versions`.
        features: a layer whose features are a second output; None for probabilities alone.
        one_file: whether each file holds all its weights, so that it loads alone, from memory, too.
    Raises:
        UserError: an opset that cannot be written.
    """

    opset: int = DEFAULT_OPSET
    one_file: bool = False
    features: FeatureLayer | None = None

    def __post_init__(self) -> None:
        if not MIN_OPSET <= self.opset <= MAX_OPSET:
            raise UserError(f"--opset {self.opset}: a number from {MIN_OPSET} to {MAX_OPSET}")
