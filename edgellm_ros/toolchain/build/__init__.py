"""Building TensorRT engines from a bundle's `decoder.onnx`: targets, profiles, builder, checks and report."""
