"""ONNX networks to TensorRT engines, and what the compiler made of them."""
