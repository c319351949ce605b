"""Rotary positions as ONNX Runtime's own operator: the same values, where the tables are a rotation's."""

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from cvx_deploy.bundle.opened import Bundle
from cvx_deploy.engines.onnxruntime.graphs import computed, graph_for_cpu
from cvx_deploy.graph.rotary import rotate_at_once
from cvx_deploy.miniatures import miniature
from tests.tolerances import REWRITE_RELATIVE

BATCH, HEADS, TOKENS, SIZE, TEXT = 2, 4, 30, 16, 7
SHAPE = ("batch", HEADS, TOKENS, SIZE)
ANGLES = np.random.default_rng(1).uniform(-3, 3, (TOKENS - TEXT, SIZE // 2)).astype(np.float32)
COS, SIN = np.repeat(np.cos(ANGLES), 2, 1), np.repeat(np.sin(ANGLES), 2, 1)
SIGNS = np.tile(np.array([-1, 1], np.float32), SIZE // 2)
SWAP = np.arange(SIZE) ^ 1


def rotation(cos: NDArray[Any] = COS, sin: NDArray[Any] = SIN * SIGNS, swap: NDArray[Any] = SWAP) -> onnx.ModelProto:
    """Return the rotation of the tokens after a text, as the exporter's rewrite leaves it."""
    nodes = [
        helper.make_node("Constant", [], ["swap"], value=numpy_helper.from_array(swap)),
        helper.make_node("Concat", ["ones", "cos"], ["all_cos"], axis=0),
        helper.make_node("Concat", ["zeros", "sin"], ["all_sin"], axis=0),
        helper.make_node("Gather", ["x", "swap"], ["swapped"], axis=-1),
        helper.make_node("Mul", ["x", "all_cos"], ["straight"]),
        helper.make_node("Mul", ["swapped", "all_sin"], ["turned"]),
        helper.make_node("Add", ["straight", "turned"], ["y"], "rotated"),
    ]
    tables = {"cos": cos, "sin": sin, "ones": np.ones((TEXT, SIZE)), "zeros": np.zeros((TEXT, SIZE))}
    graph = helper.make_graph(
        nodes,
        "one",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, SHAPE)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, SHAPE)],
        [numpy_helper.from_array(table.astype(np.float32), name) for name, table in tables.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_operatorsetid("", 23)], ir_version=10)


def run(model: onnx.ModelProto) -> NDArray[Any]:
    x = np.random.default_rng(0).standard_normal((BATCH, HEADS, TOKENS, SIZE), np.float32)
    (found,) = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": x})
    return found


def difference(found: NDArray[Any], expected: NDArray[Any]) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def test_the_rotation_is_the_same() -> None:
    model = rotation()
    expected = run(model)
    assert rotate_at_once(model, computed) == 1
    assert [node.op_type for node in model.graph.node] == ["RotaryEmbedding"], "nothing else is left to be run"
    assert difference(run(model), expected) < REWRITE_RELATIVE["fp32"]


def test_twin_a_rotation_the_other_way_is_found() -> None:
    turned = rotation(sin=-SIN * SIGNS)
    assert rotate_at_once(turned, computed) == 1
    assert difference(run(turned), run(rotation())) > REWRITE_RELATIVE["fp32"]


@pytest.mark.parametrize(
    "model",
    [
        rotation(cos=np.random.default_rng(2).standard_normal(COS.shape)),
        rotation(sin=SIN),
        rotation(swap=np.roll(np.arange(SIZE), SIZE // 2)),
    ],
    ids=["cosines of a pair differ", "sines without signs", "halves exchanged"],
)
def test_what_is_no_rotation_of_pairs_is_left_alone(model: onnx.ModelProto) -> None:
    before = model.SerializeToString()
    assert rotate_at_once(model, computed) == 0
    assert model.SerializeToString() == before


def test_tables_that_a_run_puts_in_are_left_alone() -> None:
    model = rotation()
    table = next(each for each in model.graph.initializer if each.name == "cos")
    model.graph.initializer.remove(table)
    model.graph.input.append(helper.make_tensor_value_info("cos", TensorProto.FLOAT, table.dims))
    assert rotate_at_once(model, computed) == 0


def test_both_rotations_of_every_block_of_the_miniature_are_rewritten() -> None:
    bundle = Bundle.open(miniature("mini"))
    graph = onnx.ModelProto.FromString(
        graph_for_cpu(bundle.onnx_bytes("transformer"), bundle.network("transformer"), {"batch": 2})
    )
    blocks = sum(node.op_type == "Attention" for node in graph.graph.node)
    assert sum(node.op_type == "RotaryEmbedding" for node in graph.graph.node) == 2 * blocks > 0
