"""Resize and Pad of bfloat16 values through float32: not a bit of them changes."""

from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from cvx_deploy.graph.moves_in_float32 import move_in_float32
from tests.conftest import Exported

SHAPE = (1, 2, 3, 4)
WIDE = (1, 2, 6, 8)
BFLOAT16: Any = helper.tensor_dtype_to_np_dtype(TensorProto.BFLOAT16)


def resize(kind: int = TensorProto.BFLOAT16, mode: str = "nearest") -> onnx.ModelProto:
    scales = helper.make_node("Constant", [], ["scales"], value_floats=[1.0, 1.0, 2.0, 2.0])
    node = helper.make_node(
        "Resize", ["x", "", "scales"], ["y"], "up", mode=mode, coordinate_transformation_mode="asymmetric",
        nearest_mode="floor",
    )  # fmt: skip
    return model([scales, node], kind, WIDE)


def pad(kind: int = TensorProto.BFLOAT16, filled: bool = True) -> onnx.ModelProto:
    pads = helper.make_node("Constant", [], ["pads"], value_ints=[0, 0, 1, 2, 0, 0, 2, 2])
    value = numpy_helper.from_array(np.array(0.3, helper.tensor_dtype_to_np_dtype(kind)))
    constant = helper.make_node("Constant", [], ["value"], value=value)
    node = helper.make_node("Pad", ["x", "pads", *(["value"] if filled else [])], ["y"], "border")
    return model([pads, constant, node], kind, WIDE)


def model(nodes: list[onnx.NodeProto], kind: int, shape: tuple[int, ...]) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "one",
        [helper.make_tensor_value_info("x", kind, SHAPE)],
        [helper.make_tensor_value_info("y", kind, shape)],
    )
    return helper.make_model(graph, opset_imports=[helper.make_operatorsetid("", 23)], ir_version=10)


def run(graph: onnx.ModelProto) -> NDArray[Any]:
    x = np.random.default_rng(0).standard_normal(SHAPE).astype(BFLOAT16)
    (found,) = ReferenceEvaluator(graph).run(None, {"x": x})
    return np.asarray(found)


def float32_moves(graph: onnx.ModelProto) -> None:
    """Make sure that no Resize or Pad of bfloat16 values is left, as ONNX's own inference sees it."""
    inferred = onnx.shape_inference.infer_shapes(graph, strict_mode=True, check_type=True)
    types = {value.name: value.type.tensor_type.elem_type for value in inferred.graph.value_info}
    for node in inferred.graph.node:
        if node.op_type in ("Resize", "Pad"):
            assert {types[name] for name in (node.input[0], *node.output)} == {TensorProto.FLOAT}


@pytest.mark.parametrize("graph", [resize(), pad(), pad(filled=False)], ids=["resize", "pad", "pad with zeros"])
def test_the_values_are_the_same_bit_for_bit(graph: onnx.ModelProto) -> None:
    expected = run(graph)
    assert move_in_float32(graph) == 1
    float32_moves(graph)
    found = run(graph)
    assert found.dtype == expected.dtype == BFLOAT16
    assert found.tobytes() == expected.tobytes()


def test_twin_a_narrower_type_on_the_way_is_found() -> None:
    graph = resize()
    expected = run(graph)
    move_in_float32(graph)
    cast = next(node for node in graph.graph.node if node.op_type == "Cast")
    cast.attribute[0].i = TensorProto.FLOAT8E5M2
    with pytest.raises((AssertionError, onnx.shape_inference.InferenceError)):
        float32_moves(graph)
    assert run(graph).tobytes() != expected.tobytes()


@pytest.mark.parametrize(
    "graph",
    [resize(TensorProto.FLOAT16), resize(mode="linear"), pad(TensorProto.FLOAT)],
    ids=["fp16", "linear", "fp32"],
)
def test_what_has_kernels_or_makes_new_values_is_left_alone(graph: onnx.ModelProto) -> None:
    before = graph.SerializeToString()
    assert move_in_float32(graph) == 0
    assert graph.SerializeToString() == before


def test_a_decoder_of_bfloat16_moves_all_its_frames_in_float32(exported: Exported) -> None:
    graph = onnx.load(exported("5b", precision="bf16").onnx_path("vae_decoder_first"), load_external_data=False)
    assert move_in_float32(graph) == sum(node.op_type in ("Resize", "Pad") for node in graph.graph.node) > 0
