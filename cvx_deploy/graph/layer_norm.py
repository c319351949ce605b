"""Layer norms of half precision without a copy of their input in float32.

Before::

    y = LayerNormalization(x, weight, bias)                       x is bfloat16 or float16, statistics in float32

After, with the same values::

    wide = cast32(x); mean = ReduceMean(wide); deviation = (ReduceMean((wide - mean) ** 2) + epsilon) ** 0.5
    again = Where(deviation >= 0, x, 0)
    y = cast((cast32(again) - mean) / deviation * weight + bias)

TensorRT makes two kernels of a norm whose output is worked on further, one for the statistics and one for the rest, and
writes all that both need, x - mean, in float32 from the first to the second. A root is never below 0, so `again` is x;
but the compiler cannot know that before the deviation is there, and so the second kernel starts from x itself, in half
the bytes and mostly there already. (Where the deviation is NaN, so is y, as before.) Norms of float32 networks, and
their fused kernels, are left alone.
"""

import numpy as np
import onnx_ir as ir

from cvx_deploy.graph.patterns import constant_node, made

_HALVES = (ir.DataType.BFLOAT16, ir.DataType.FLOAT16)
_WIDE = ir.TensorType(ir.DataType.FLOAT)


def lean_layer_norms(model: ir.Model) -> int:
    """Rewrite every layer norm of a half type over the last axis; return how many there were."""
    todo = [node for node in model.graph if node.op_type == "LayerNormalization" and _fits(node)]
    for node in todo:
        _rewrite(model.graph, node)
    return len(todo)


def _fits(node: ir.Node) -> bool:
    x = node.inputs[0]
    return x is not None and x.dtype in _HALVES and node.attributes.get_int("axis", -1) == -1 and len(node.outputs) == 1


class _Chain:
    """Nodes in a row, named after the norm they stand for."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.nodes: list[ir.Node] = []

    def add(self, op_type: str, *inputs: ir.Value | None, like: ir.Value, **attributes: object) -> ir.Value:
        node = made(op_type, inputs, like, f"{self.name}/{op_type}_{len(self.nodes)}", attributes)
        node.outputs[0].type = _WIDE
        self.nodes.append(node)
        return node.outputs[0]

    def constant(self, array: object) -> ir.Value:
        node = constant_node(np.asarray(array), f"{self.name}/constant_{len(self.nodes)}")
        self.nodes.append(node)
        return node.outputs[0]


def _rewrite(graph: ir.Graph, norm: ir.Node) -> None:
    x, output = norm.inputs[0], norm.outputs[0]
    assert x is not None
    chain = _Chain(str(norm.name))
    wide = chain.add("Cast", x, like=x, to=ir.DataType.FLOAT)
    axes = chain.constant(np.array([-1], np.int64))
    mean = chain.add("ReduceMean", wide, axes, like=x)
    if x.shape is not None:
        mean.shape = ir.Shape([*list(x.shape)[:-1], 1])
    centred = chain.add("Sub", wide, mean, like=x)
    variance = chain.add("ReduceMean", chain.add("Mul", centred, centred, like=x), axes, like=mean)
    epsilon = chain.constant(np.float32(norm.attributes.get_float("epsilon", 1e-5)))
    deviation = chain.add("Sqrt", chain.add("Add", variance, epsilon, like=mean), like=mean)
    scale = chain.add("Reciprocal", deviation, like=mean)
    known = chain.add("GreaterOrEqual", deviation, chain.constant(np.float32(0)), like=mean)
    known.type = ir.TensorType(ir.DataType.BOOL)
    zero = chain.add("Cast", chain.constant(np.float32(0)), like=mean, to=x.dtype)
    zero.type, zero.shape = x.type, ir.Shape([])
    again = chain.add("Where", known, x, zero, like=x)
    again.type = x.type
    y = chain.add("Sub", chain.add("Cast", again, like=x, to=ir.DataType.FLOAT), mean, like=x)
    y = chain.add("Mul", y, scale, like=x)
    for op_type, parameter in zip(("Mul", "Add"), norm.inputs[1:], strict=False):
        if parameter is not None:
            y = chain.add(op_type, y, chain.add("Cast", parameter, like=parameter, to=ir.DataType.FLOAT), like=x)
    assert output.dtype is not None
    y = chain.add("Cast", y, like=output, to=output.dtype)
    y.type = output.type
    graph.insert_before(norm, chain.nodes)
    output.replace_all_uses_with(y, replace_graph_outputs=True)
    graph.remove(norm, safe=True)
