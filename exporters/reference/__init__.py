"""Eager PyTorch: what parity and benchmarks hold engines against."""
