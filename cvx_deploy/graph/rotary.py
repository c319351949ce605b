"""Rotary positions as ONNX Runtime's own operator for CPUs, when a graph is loaded.

Before, as `cvx_deploy.graph.rope` leaves it, with tables (S, D) of all tokens::

    y = x * cos + Gather(x, swap) * sin                           x and y (B, heads, S, D); swap exchanges each pair

After, with the same values::

    y = com.microsoft.RotaryEmbedding(x, 0, cos[:, ::2], sin[:, 1::2], interleaved=1)

A Gather along the last axis copies value by value, and takes ONNX Runtime longer than the attention that follows; the
operator goes once through x. It wants one cosine and one sine for each pair: where those of a pair differ, by more than
the sign of the sines, the graph stays as it is. Other engines do not know it; so this is done in memory.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cvx_deploy.graph.contrib import DOMAIN, allow_contrib
from cvx_deploy.graph.needed import keep_needed

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

Table = NDArray[np.float32]
Compute = Callable[["ModelProto"], Sequence[Table]]


def rotate_at_once(model: "ModelProto", compute: Compute) -> int:
    """Rewrite every rotation of float32 values, and return how many there were.

    Args:
        model: A graph, weights outside of it.
        compute: Returns the outputs of a small graph without inputs, in its order.
    """
    from onnx import helper, numpy_helper

    makers = {name: node for node in model.graph.node for name in node.output}
    found = [rotation for node in model.graph.node if (rotation := _match(node, makers))]
    names = {name for rotation in found for name in (rotation.cos, rotation.sin)}
    halves = _halved(_values(model, makers, names, compute), found)
    found = [rotation for rotation in found if rotation.cos in halves and rotation.sin in halves]
    if not found:
        return 0
    start = numpy_helper.from_array(np.zeros(1, np.int64), "rotary/start")
    model.graph.initializer.extend(
        [start, *(numpy_helper.from_array(each, f"{name}/pairs") for name, each in halves.items())]
    )
    for rotation in found:
        inputs = [rotation.x, start.name, f"{rotation.cos}/pairs", f"{rotation.sin}/pairs"]
        node = helper.make_node(
            "RotaryEmbedding", inputs, rotation.node.output, rotation.node.name, domain=DOMAIN, interleaved=1
        )
        rotation.node.CopyFrom(node)
    keep_needed(model, list(model.graph.node))
    allow_contrib(model)
    return len(found)


@dataclass(frozen=True)
class _Rotation:
    """The Add that ends a rotation of `x`, and the names of its tables."""

    node: "NodeProto"
    x: str
    cos: str
    sin: str


def _match(add: "NodeProto", makers: Mapping[str, "NodeProto"]) -> _Rotation | None:
    terms = [makers.get(name) for name in add.input] if add.op_type == "Add" else []
    if len(terms) != 2 or any(term is None or term.op_type != "Mul" for term in terms):
        return None
    straight, swapped = (list(term.input) for term in terms if term is not None)
    gather = makers.get(swapped[0])
    if gather is None or gather.op_type != "Gather" or gather.input[0] != straight[0]:
        return None
    order, axis = (
        _constant(makers.get(gather.input[1])),
        next((each.i for each in gather.attribute if each.name == "axis"), 0),
    )
    if order is None or axis not in (-1, 3) or order.tolist() != [each ^ 1 for each in range(order.size)]:
        return None
    return _Rotation(add, straight[0], straight[1], swapped[1])


def _constant(node: "NodeProto | None") -> NDArray[Any] | None:
    from onnx import numpy_helper

    value = next((each.t for each in node.attribute if each.name == "value"), None) if node is not None else None
    return None if value is None else numpy_helper.to_array(value)


def _values(
    model: "ModelProto", makers: Mapping[str, "NodeProto"], names: Collection[str], compute: Compute
) -> dict[str, Table]:
    """Compute the tables that depend on nothing but constants that lie in the graph."""
    from onnx import helper

    stored = {tensor.name: tensor for tensor in model.graph.initializer if not tensor.external_data}
    known = [name for name in sorted(names) if _is_known(name, makers, stored)]
    needed: set[str] = set()
    todo = list(known)
    while todo:
        name = todo.pop()
        if name and name not in needed:
            needed.add(name)
            todo += makers[name].input if name in makers else []
    nodes = [node for node in model.graph.node if needed.intersection(node.output)]
    kept = [tensor for name, tensor in stored.items() if name in needed]
    outputs = [helper.make_empty_tensor_value_info(name) for name in known]
    graph = helper.make_graph(nodes, "tables", [], outputs, kept)
    tables = helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
    return dict(zip(known, compute(tables) if known else [], strict=True))


def _is_known(name: str, makers: Mapping[str, "NodeProto"], stored: Collection[str]) -> bool:
    if name in makers:
        return all(_is_known(each, makers, stored) for each in makers[name].input if each)
    return name in stored


def _halved(tables: Mapping[str, Table], found: list[_Rotation]) -> dict[str, Table]:
    """Return one cosine and one sine of each pair, where both of a pair have the same."""
    halves: dict[str, Table] = {}
    for rotation in found:
        cos, sin = tables.get(rotation.cos), tables.get(rotation.sin)
        if cos is None or sin is None or cos.ndim != 2 or cos.dtype != np.float32 or sin.dtype != np.float32:
            continue
        if np.array_equal(cos[:, ::2], cos[:, 1::2]) and np.array_equal(-sin[:, ::2], sin[:, 1::2]):
            halves |= {rotation.cos: cos[:, ::2].copy(), rotation.sin: sin[:, 1::2].copy()}
    return halves
