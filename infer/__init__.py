"""Export to ONNX and TensorRT, and batch prediction with what was exported."""
