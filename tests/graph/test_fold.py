"""What is folded, and what never is."""

import numpy as np
import onnx_ir as ir
import pytest

from cvx_deploy.graph.fold import fold_indices


def graph_with(axes_from_weight: bool) -> ir.Model:
    """Reshape(x, Concat(2, Reshape(3))): the sizes are computed in the graph, or one of them from a weight."""
    x = ir.Value(name="x", shape=ir.Shape([6]), type=ir.TensorType(ir.DataType.FLOAT))
    two = ir.node("Constant", [], attributes={"value": ir.tensor(np.array([2]), name="two")})
    three = ir.node("Constant", [], attributes={"value": ir.tensor(np.array(3), name="three")})
    axis = ir.node("Constant", [], attributes={"value": ir.tensor(np.array([-1]), name="axis")})
    weight = ir.Value(name="weight", const_value=ir.tensor(np.array(3), name="weight"))
    listed = ir.node("Reshape", [weight if axes_from_weight else three.outputs[0], axis.outputs[0]])
    sizes = ir.node("Concat", [two.outputs[0], listed.outputs[0]], attributes={"axis": 0})
    reshaped = ir.node("Reshape", [x, sizes.outputs[0]])
    nodes = [two, three, axis, listed, sizes, reshaped]
    initializers = [weight] if axes_from_weight else []
    graph = ir.Graph([x], reshaped.outputs, nodes=nodes, initializers=initializers, opset_imports={"": 23})
    return ir.Model(graph, ir_version=10)


def test_sizes_that_the_graph_computes_become_constants() -> None:
    model = graph_with(axes_from_weight=False)
    fold_indices(model)
    reshape = model.graph.node(-1)
    assert reshape.inputs[1] is not None
    constant = reshape.inputs[1].producer()
    assert constant is not None
    assert constant.op_type == "Constant"
    assert constant.attributes["value"].as_tensor().numpy().tolist() == [2, 3]
    assert not model.graph.initializers


def test_what_comes_from_a_weight_stays() -> None:
    model = graph_with(axes_from_weight=True)
    fold_indices(model)
    assert [node.op_type for node in model.graph if node.op_type != "Constant"] == ["Reshape", "Concat", "Reshape"]
    assert list(model.graph.initializers) == ["weight"]


@pytest.mark.parametrize("size", [64, 65])
def test_only_what_is_small_is_folded(size: int) -> None:
    table = ir.node("Constant", [], attributes={"value": ir.tensor(np.arange(size), name="table")})
    negated = ir.node("Neg", [table.outputs[0]])
    model = ir.Model(ir.Graph([], negated.outputs, nodes=[table, negated], opset_imports={"": 23}), ir_version=10)
    fold_indices(model)
    assert any(node.op_type == "Neg" for node in model.graph) == (size > 64)
