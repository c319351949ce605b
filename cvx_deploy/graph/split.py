"""One Split where the exporter wrote a sequence.

Before::

    s = SplitToSequence(x, sizes); a = SequenceAt(s, 0); b = SequenceAt(s, 1)

After::

    a, b = Split(x, sizes)

Sequences have no bfloat16, and TensorRT has no sequences.
"""

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray


def split_without_sequences(model: ir.Model) -> int:
    """Rewrite every SplitToSequence whose pieces are taken by constant index; return how many were."""
    rewritten = 0
    for node in list(model.graph):
        if node.op_type == "SplitToSequence" and _rewrite(model.graph, node):
            rewritten += 1
    return rewritten


def _rewrite(graph: ir.Graph, node: ir.Node) -> bool:
    source, sizes = node.inputs[0], _sizes(node)
    users = [usage.node for usage in node.outputs[0].uses()]
    indices = [_constant(user.inputs[1]) if user.op_type == "SequenceAt" else None for user in users]
    if source is None or sizes is None or any(index is None for index in indices):
        return False
    value = ir.tensor(np.array(sizes, np.int64))
    lengths = ir.node("Constant", [], attributes={"value": value}, name=f"{node.name}/sizes")
    split = ir.node(
        "Split",
        [source, lengths.outputs[0]],
        attributes={"axis": node.attributes.get_int("axis", 0)},
        num_outputs=len(sizes),
        name=node.name,
    )
    graph.insert_before(node, [lengths, split])
    for user, index in zip(users, indices, strict=True):
        piece, taken = split.outputs[int(index.item())], user.outputs[0]  # type: ignore[union-attr]
        piece.shape, piece.type = taken.shape, source.type
        taken.replace_all_uses_with(piece, replace_graph_outputs=True)
        graph.remove(user, safe=True)
    graph.remove(node, safe=True)
    return True


def _sizes(node: ir.Node) -> list[int] | None:
    """Return the length of every piece, or None when the graph does not fix them."""
    source, sizes = node.inputs[0], _constant(node.inputs[1]) if len(node.inputs) > 1 else None
    if source is None or source.shape is None or sizes is None:
        return None
    if sizes.ndim:
        return [int(size) for size in sizes]
    length, chunk = source.shape[node.attributes.get_int("axis", 0)], int(sizes)
    if not isinstance(length, int):
        return None
    return [min(chunk, length - start) for start in range(0, length, chunk)]


def _constant(value: ir.Value | None) -> NDArray[Any] | None:
    """Return the value of a constant, or None."""
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    return None if tensor is None else tensor.numpy()
