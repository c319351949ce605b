"""Sizes, axes and indices that the exporter computes in the graph, computed once.

TensorRT takes the axes of a reduction and the shape of a reshape only where it can read them off the graph. A weight,
or anything computed from one, is never folded: that would copy it into the graph.
"""

import onnx_ir as ir
from onnxscript.optimizer import fold_constants

_LARGEST = 64
"""Elements of a value that is an index, an axis or a shape, never a table or a weight."""


def fold_indices(model: ir.Model) -> None:
    """Fold, in place, every node whose inputs are small constants of the graph itself."""
    weights = set(model.graph.initializers)

    def should_fold(node: ir.Node) -> bool | None:
        """Refuse a node that reads a weight; leave all others to the usual rules."""
        return False if weights & {value.name for value in node.inputs if value is not None} else None

    fold_constants(model, input_size_limit=_LARGEST, output_size_limit=_LARGEST, should_fold=should_fold)
    # In their own order: that of a set differs from run to run, and the graph's hash with it.
    for name in [name for name in model.graph.initializers if name not in weights]:
        _as_node(model.graph, model.graph.initializers[name])


def _as_node(graph: ir.Graph, folded: ir.Value) -> None:
    """Make a folded value a Constant node again, as the exporter writes those: initializers are the checkpoint's."""
    assert folded.const_value is not None
    node = ir.node("Constant", [], attributes={"value": folded.const_value}, name=f"{folded.name}/Constant")
    folded.replace_all_uses_with(node.outputs[0], replace_graph_outputs=True)
    del graph.initializers[str(folded.name)]
    graph.insert_before(graph[0], node)
