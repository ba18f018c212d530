"""Export to ONNX and TensorRT, and batch prediction with what was exported.

`Predictor` and `find_inputs` are imported when they are first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from infer.predict.inputs import find_inputs as find_inputs
    from infer.predictor import Predictor as Predictor

__all__ = ["Predictor", "find_inputs"]


def __getattr__(name: str) -> Any:
    if name == "Predictor":
        from infer.predictor import Predictor

        return Predictor
    if name == "find_inputs":
        from infer.predict.inputs import find_inputs

        return find_inputs
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
