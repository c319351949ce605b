"""Checkpoint in, ONNX out: the only code that imports torch, diffusers, transformers or optimum."""
