"""Bundles in, videos out: NumPy on the host, a network engine behind one seam, no PyTorch."""

import os

# Set before ONNX Runtime is imported: it would keep an identifier in the home folder and send usage data to its makers.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
