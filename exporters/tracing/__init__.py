"""A contract and a checkpoint to an ONNX graph whose weights stay where they are."""
