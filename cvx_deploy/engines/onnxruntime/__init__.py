"""ONNX Runtime: on any CPU, and on a GPU with its CUDA provider."""
