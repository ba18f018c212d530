"""Export to ONNX and TensorRT, and batch prediction with what was exported."""

import runpy
from pathlib import Path

# From beside this package, whatever else has the name where Python looks first.
_start = Path(__file__).parents[1] / "data_pipeline/common/start.py"
runpy.run_path(str(_start))["import_own"]("data_pipeline")
