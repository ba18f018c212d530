"""BVLC's AlexNet as ONNX, without its weights: a file that comes with the onnx package."""

from __future__ import annotations

from pathlib import Path

import onnx


def bvlc_file() -> onnx.ModelProto:
    """Load the file."""
    folder = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"
    return onnx.load(folder / "light_bvlc_alexnet.onnx")
