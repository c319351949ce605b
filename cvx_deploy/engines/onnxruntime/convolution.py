"""Whether ONNX Runtime works here, told by one small convolution: on a GPU nothing before that needs cuDNN."""

import re

import numpy as np
import onnxruntime

from cvx_deploy.errors import EngineError
from cvx_deploy.install import pip_install

_CUDNN = f"{pip_install('gpu')}, which brings cuDNN along, or put its folder into LD_LIBRARY_PATH"
_AGAIN = "pip install --force-reinstall onnxruntime"


def check_convolution(device: int | None = None) -> None:
    """Run a convolution of one channel on the CPU, or on a GPU.

    Args:
        device: The CUDA device; None for the CPU.

    Raises:
        EngineError: It fails; ONNX Runtime's reason, and what is missing.
    """
    place = "the CPU" if device is None else f"GPU {device}"
    providers = ["CPUExecutionProvider"] if device is None else [("CUDAExecutionProvider", {"device_id": str(device)})]
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what goes wrong is raised
    try:
        session = onnxruntime.InferenceSession(
            _graph(), options, providers=providers, enable_fallback=0, disabled_optimizers=[]
        )
        (found,) = session.run(None, {"x": np.ones((1, 1, 2, 2), np.float32)})
    except Exception as error:  # each of ONNX Runtime's is a class of its own
        reason = re.split(r"\[ONNXRuntimeError\] : \d+ : \w+ : ", str(error).strip().splitlines()[0])[-1]
        raise EngineError(
            f"ONNX Runtime cannot convolve on {place}: {reason}", fix=_AGAIN if device is None else _CUDNN
        ) from error
    if found.tolist() != [[[[4.0]]]]:
        raise EngineError(f"ONNX Runtime convolves wrongly on {place}", fix=_AGAIN if device is None else _CUDNN)


def _graph() -> bytes:
    """Return a network that sums a picture of 2x2 pixels up."""
    from onnx import TensorProto, helper

    weight = helper.make_tensor("w", TensorProto.FLOAT, [1, 1, 2, 2], [1.0] * 4)
    values = {
        name: helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 1, size, size])
        for name, size in {"x": 2, "y": 1}.items()
    }
    graph = helper.make_graph(
        [helper.make_node("Conv", ["x", "w"], ["y"])], "sum", [values["x"]], [values["y"]], [weight]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_operatorsetid("", 23)], ir_version=10)
    return bytes(model.SerializeToString())
