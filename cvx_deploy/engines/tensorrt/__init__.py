"""TensorRT and TensorRT for RTX: networks compiled, judged, kept and run."""
