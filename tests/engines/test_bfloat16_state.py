"""What chunks of a bfloat16 VAE hand on passes as bfloat16 in every engine, and never comes to the host."""

from typing import Any

import numpy as np
import onnx
import openvino
import pytest
from onnx import TensorProto, helper

from cvx_deploy.bundle.opened import Bundle
from cvx_deploy.bundle.schema import Network, StoredFile, TensorSpec, numpy_dtype
from cvx_deploy.engines.backend import refuse_bfloat16
from cvx_deploy.engines.onnxruntime.backend import OrtBackend
from cvx_deploy.engines.openvino.backend import OpenVinoBackend, OpenVinoSession
from cvx_deploy.engines.tensorrt.session import BoundTensor, Layout
from cvx_deploy.errors import EngineError
from cvx_deploy.graph.widened import widen
from cvx_deploy.miniatures import miniature

BFLOAT16 = numpy_dtype("bfloat16")
SHAPE = (2, 3)
THIRD = 1 / 3  # rounded to 8 bits it is another number


def spec(name: str, dtype: Any) -> TensorSpec:
    return TensorSpec(name, dtype, SHAPE, "AB")


def network(state: Any = "bfloat16") -> Network:
    """Return a network that adds its input to its state, puts the sum out, and hands it on."""
    inputs = (spec("x", "float32"), spec("cache", state))
    outputs = (spec("y", "float32"), spec("new_cache", state))
    return Network(StoredFile("x.onnx", 1, "0" * 64), inputs, outputs, (), {"cache": "new_cache"}, "bf16")


def graph() -> onnx.ModelProto:
    nodes = [
        helper.make_node("Cast", ["x"], ["narrow"], to=TensorProto.BFLOAT16),
        helper.make_node("Add", ["narrow", "cache"], ["new_cache"]),
        helper.make_node("Cast", ["new_cache"], ["y"], to=TensorProto.FLOAT),
    ]
    kinds = {
        "x": TensorProto.FLOAT,
        "y": TensorProto.FLOAT,
        "cache": TensorProto.BFLOAT16,
        "new_cache": TensorProto.BFLOAT16,
    }
    values = {name: helper.make_tensor_value_info(name, kind, SHAPE) for name, kind in kinds.items()}
    made = helper.make_graph(nodes, "sum", [values["x"], values["cache"]], [values["y"], values["new_cache"]])
    return helper.make_model(made, opset_imports=[helper.make_operatorsetid("", 23)], ir_version=10)


@pytest.fixture
def mini() -> Bundle:
    return Bundle.open(miniature("mini"))


def test_openvino_hands_state_on_in_its_own_type(mini: Bundle) -> None:
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(graph().SerializeToString()), "CPU")
    session = OpenVinoSession("sum", network(), compiled, {})
    given = session.run({"x": np.full(SHAPE, THIRD, np.float32), "cache": np.zeros(SHAPE, BFLOAT16)})
    assert given["new_cache"].dtype == BFLOAT16
    assert given["new_cache"].nbytes == 2 * np.prod(SHAPE)
    again = session.run({"x": np.zeros(SHAPE, np.float32), "cache": given["new_cache"]})
    assert again["y"].tolist() == given["y"].tolist()
    assert abs(again["y"] - THIRD).max() > 1e-4, "in float32 nothing would be rounded"
    with pytest.raises(EngineError, match="NumPy has no such type"):
        OpenVinoBackend(mini).to_host(given["new_cache"])


def test_tensorrt_lays_out_half_the_bytes_of_float32() -> None:
    halves, wholes = Layout(network(), {}), Layout(network("float32"), {})
    assert 2 * sum(halves.shared().values()) == sum(wholes.shared().values()) == 2 * 4 * np.prod(SHAPE)
    assert str(BoundTensor.of(spec("cache", "bfloat16"), {})) == "bfloat16 (2, 3)"
    assert halves.own_bytes() == wholes.own_bytes()


def test_onnx_runtime_takes_it_from_the_host_and_does_not_give_it_back(mini: Bundle) -> None:
    backend = OrtBackend(mini, threads=1)
    tensor = backend.to_device(np.full(SHAPE, THIRD, BFLOAT16))
    assert tensor.data_type() == "tensor(bfloat16)"
    with pytest.raises(EngineError, match="NumPy has no such type"):
        backend.to_host(tensor)


def test_a_widened_graph_takes_and_gives_float32() -> None:
    wide = graph()
    widen(wide)
    values = (*wide.graph.input, *wide.graph.output)
    assert {value.type.tensor_type.elem_type for value in values} == {TensorProto.FLOAT}
    onnx.checker.check_model(wide, full_check=True)


@pytest.mark.parametrize("dtype", ["float32", "float16", "int64"])
def test_other_types_are_read(dtype: str) -> None:
    refuse_bfloat16(dtype)
