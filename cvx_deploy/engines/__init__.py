"""What runs networks: one registry, one seam, a folder for each kind of engine."""

import os

# Set before ONNX Runtime is imported: it would keep an identifier in the home folder and send usage data to its makers.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
