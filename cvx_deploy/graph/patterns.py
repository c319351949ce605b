"""What rewrites ask of a graph."""

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
from numpy.typing import NDArray


def constant(value: ir.Value | None) -> NDArray[Any] | None:
    """Return the value of a constant of the graph itself, or None; a weight is none, even where its bytes are known."""
    if value is None or value.is_initializer():
        return None
    tensor = ir.convenience.get_const_tensor(value)
    return None if tensor is None else tensor.numpy()


def producer(value: ir.Value | None, *op_types: str) -> ir.Node | None:
    """Return the node a value is made by, if it is one of these operators."""
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type in op_types else None


def above(value: ir.Value | None, *op_types: str) -> ir.Value | None:
    """Follow first inputs through exactly these operators, the nearest first; None where another stands there."""
    for op_type in op_types:
        node = producer(value, op_type)
        if node is None:
            return None
        value = node.inputs[0]
    return value


def constant_node(array: NDArray[Any], name: str) -> ir.Node:
    """Return a Constant node, named by its place."""
    return ir.node("Constant", [], attributes={"value": ir.tensor(array)}, name=name)


def made(
    op_type: str,
    inputs: Sequence[ir.Value | None],
    like: ir.Value,
    name: str,
    attributes: dict[str, Any] | None = None,
) -> ir.Node:
    """Return a node of one output, of the type of `like`; of its shape too."""
    node = ir.node(op_type, inputs, attributes=attributes or {}, name=name)
    node.outputs[0].type, node.outputs[0].shape = like.type, like.shape
    return node
