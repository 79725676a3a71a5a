"""The decoder as ONNX: `portable` in standard operators, `onnxruntime` with the operators fastest on a CPU."""
