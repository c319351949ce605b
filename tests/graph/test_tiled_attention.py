"""Attention of many tokens as ONNX Runtime's own operator: the same values, none of the scores held."""

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper

from cvx_deploy.bundle.schema import Network, StoredFile, TensorSpec
from cvx_deploy.graph.tiled_attention import attend_in_tiles, holds_large_scores
from tests.tolerances import REWRITE_RELATIVE

BATCH, HEADS, TOKENS, SIZE = 2, 4, 300, 16
SHAPE = ("batch", HEADS, TOKENS, SIZE)


def attention(kind: int = TensorProto.FLOAT, inputs: int = 3, **attributes: Any) -> bytes:
    """Return a graph of one Attention, as the exporter writes it."""
    names = ["q", "k", "v", "mask"][:inputs]
    shapes = [SHAPE, SHAPE, SHAPE, (TOKENS, TOKENS)][:inputs]
    graph = helper.make_graph(
        [helper.make_node("Attention", names, ["y"], "attn1", **attributes)],
        "one",
        [helper.make_tensor_value_info(name, kind, shape) for name, shape in zip(names, shapes, strict=True)],
        [helper.make_tensor_value_info("y", kind, SHAPE)],
    )
    opsets = [helper.make_operatorsetid("", 23)]
    return bytes(helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString())


def in_tiles(graph: bytes) -> bytes:
    model = onnx.ModelProto.FromString(graph)
    attend_in_tiles(model)
    return bytes(model.SerializeToString())


def run(graph: bytes) -> NDArray[Any]:
    rng = np.random.default_rng(0)
    session = onnxruntime.InferenceSession(graph)
    feeds = {each.name: rng.standard_normal((BATCH, HEADS, TOKENS, SIZE), np.float32) for each in session.get_inputs()}
    (found,) = session.run(None, feeds)
    return found


def operators(graph: bytes) -> set[str]:
    return {node.op_type for node in onnx.ModelProto.FromString(graph).graph.node}


def difference(found: NDArray[Any], expected: NDArray[Any]) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("attributes", [{}, {"scale": 0.125}, {"is_causal": 0, "softcap": 0.0}])
def test_tiled_attention_gives_the_same(attributes: dict[str, Any]) -> None:
    graph = attention(**attributes)
    tiled = in_tiles(graph)
    assert "Attention" not in operators(tiled)
    assert difference(run(tiled), run(graph)) < REWRITE_RELATIVE["fp32"]


def test_twin_another_scale_is_found() -> None:
    expected = run(attention())
    assert difference(run(in_tiles(attention(scale=0.3))), expected) > REWRITE_RELATIVE["fp32"]


@pytest.mark.parametrize(
    "graph",
    [attention(is_causal=1), attention(softcap=20.0), attention(inputs=4), attention(TensorProto.FLOAT16)],
    ids=["causal", "capped", "masked", "half"],
)
def test_another_kind_of_attention_is_left_alone(graph: bytes) -> None:
    assert operators(in_tiles(graph)) == {"Attention"}


@pytest.mark.parametrize(
    ("name", "frames", "far"), [("hidden_states", 4, True), ("hidden_states", 3, False), ("latents", 4, False)]
)
def test_only_a_transformer_of_many_tokens_is_rewritten(name: str, frames: int, far: bool) -> None:
    inputs = (TensorSpec(name, "float32", ("batch", frames, 16, 16, 16), "BFCHW"),)
    network = Network(StoredFile("x.onnx", 1, "0" * 64), inputs, inputs, (), {}, "fp32")
    assert holds_large_scores(network, {"batch": 2}) is far
