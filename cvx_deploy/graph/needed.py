"""Nodes that nothing reads any more, once others stand in their readers' place: an engine may go on running them."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto


def keep_needed(model: "ModelProto", nodes: "Sequence[NodeProto]") -> None:
    """Give a graph those of some nodes, in their order, that its outputs need."""
    wanted = {output.name for output in model.graph.output}
    kept: list[NodeProto] = []
    for node in reversed(nodes):
        if not wanted.isdisjoint(node.output):
            kept.append(node)
            wanted.update(node.input)
            wanted.update(name for attribute in node.attribute for each in attribute.g.node for name in each.input)
    del model.graph.node[:]
    model.graph.node.extend(kept[::-1])
