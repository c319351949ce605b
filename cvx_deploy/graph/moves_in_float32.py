"""Operators that only move values, done in float32 where an engine has no kernels for bfloat16, when a graph is loaded.

Before::

    y = Resize(x, nearest)                                        x and y in bfloat16; Pad likewise

After, with the same values::

    y = cast16(Resize(cast32(x), nearest))

Each value of y is one of x, or the constant that Pad fills with; and every bfloat16 is a float32. ONNX Runtime has no
kernels for either on CUDA in bfloat16. Other engines have; so bundles keep the first, and this is done in memory.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

_FLOAT, _BFLOAT16 = 1, 16  # onnx.TensorProto.FLOAT and BFLOAT16
_VALUES = {"Resize": (0,), "Pad": (0, 2)}
"""Operator to the inputs that hold values; the others say where to."""


def move_in_float32(model: "ModelProto") -> int:
    """Rewrite every nearest Resize and every Pad of bfloat16 values, and return how many there were."""
    types = {value.name: value.type.tensor_type.elem_type for value in (*model.graph.value_info, *model.graph.input)}
    types |= {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    found = {node.output[0] for node in model.graph.node if types.get(node.input[0] if node.input else "") == _BFLOAT16}
    todo = [node.output[0] for node in model.graph.node if node.output[0] in found and _only_moves(node)]
    if todo:
        nodes = [each for node in model.graph.node for each in (_widened(node) if node.output[0] in todo else [node])]
        del model.graph.node[:]
        model.graph.node.extend(nodes)
    return len(todo)


def _only_moves(node: "NodeProto") -> bool:
    """Whether every value that a node puts out is one that it takes."""
    if node.op_type == "Resize":
        return any(attribute.name == "mode" and attribute.s == b"nearest" for attribute in node.attribute) or not any(
            attribute.name == "mode" for attribute in node.attribute
        )
    return node.op_type == "Pad"


def _widened(node: "NodeProto") -> Iterator["NodeProto"]:
    """Yield the nodes that take a node's place."""
    from onnx import helper

    name = node.name or node.output[0]
    inputs = list(node.input)
    for index in _VALUES[node.op_type]:
        if index < len(inputs) and inputs[index]:
            wide = f"{name}/wide_{index}"
            yield helper.make_node("Cast", [inputs[index]], [wide], f"{wide}/Cast", to=_FLOAT)
            inputs[index] = wide
    moved = helper.make_node(node.op_type, inputs, [f"{name}/moved"], name)
    moved.attribute.extend(node.attribute)
    yield moved
    yield helper.make_node("Cast", moved.output, node.output, f"{name}/moved/Cast", to=_BFLOAT16)
