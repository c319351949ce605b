"""Exact rewrites of ONNX graphs, one a file: the rewritten graph computes the same values to the bit."""
