"""Equal modules of a network, of which one is traced and the others are copied.

A VAE is a dozen residual blocks and more, of a few kinds, and tracing one takes a fifth of a second. While a network is
traced, the first of each kind stands between two marks, and in the place of each of its equals is one node:

    Enter(inputs) of the first, its own nodes, Leave(outputs)  ...  Again(inputs) of another

In the graph, each Again becomes a copy of what is between the marks, its weights named after its own module, and the
marks go. Where the network runs a module in another way than as a function of those inputs, nothing is guessed.
"""

from collections.abc import Sequence

import onnx_ir as ir
import torch
from torch.onnx.ops import symbolic_multi_out

from cvx_deploy.errors import CheckpointError

_DOMAIN = "cvx_deploy.marks"
_ENTER, _LEAVE, _AGAIN = "Enter", "Leave", "Again"

Tensors = Sequence[torch.Tensor]


class Kinds:
    """What was traced of each kind of module, in one run through a network."""

    def __init__(self) -> None:
        self._first: dict[object, tuple[str, list[torch.Tensor]]] = {}

    def clear(self) -> None:
        """Forget everything: another run begins."""
        self._first.clear()

    def enter(self, module: torch.nn.Module, path: str, inputs: Tensors) -> tuple[bool, Tensors]:
        """Return whether a module is to be run, and its inputs then; else its outputs.

        Args:
            module: One that computes nothing but a function of `inputs` and of its parameters.
            path: Where it is in the network.
            inputs: Every tensor it takes.
        """
        kind = (repr(module), tuple((tensor.shape, tensor.dtype) for tensor in inputs))
        if kind not in self._first:
            self._first[kind] = path, []
            self._kind = kind
            return True, _mark(_ENTER, path, path, inputs, inputs)
        first, outputs = self._first[kind]
        return False, _mark(_AGAIN, path, first, inputs, outputs)

    def leave(self, path: str, outputs: Tensors) -> Tensors:
        """Return the outputs of the module that was entered last."""
        self._first[self._kind][1].extend(outputs)
        return _mark(_LEAVE, path, path, outputs, outputs)


def _mark(op_type: str, path: str, first: str, inputs: Tensors, like: Tensors) -> Tensors:
    return symbolic_multi_out(
        f"{_DOMAIN}::{op_type}",
        inputs,
        {"path": path, "first": first},
        dtypes=[tensor.dtype for tensor in like],
        shapes=[tensor.shape for tensor in like],
        version=1,
    )


def make_copies(model: ir.Model) -> None:
    """Put a copy of the module that was traced in the place of every equal one, in place.

    Nodes must be named by module, and weights by parameter.

    Raises:
        CheckpointError: A module that was traced takes something that is neither among its inputs nor a constant.
    """
    graph = model.graph
    marks = [node for node in graph if node.domain == _DOMAIN]
    entered = {_text(node, "path"): node for node in marks if node.op_type == _ENTER}
    left = {_text(node, "path"): node for node in marks if node.op_type == _LEAVE}
    bodies: dict[str, list[ir.Node]] = {}
    for again in marks:
        if again.op_type == _AGAIN:
            first = _text(again, "first")
            if first not in bodies:
                bodies[first] = _between(graph, entered[first], left[first])
            _copy(graph, again, entered[first], bodies[first], left[first])
    for mark in marks:
        if mark.op_type != _AGAIN:
            _replace(graph, mark, [value for value in mark.inputs if value is not None])
    model.opset_imports.pop(_DOMAIN, None)


def _text(node: ir.Node, attribute: str) -> str:
    return node.attributes[attribute].as_string()


def _between(graph: ir.Graph, enter: ir.Node, leave: ir.Node) -> list[ir.Node]:
    """Return, in order, the nodes between two marks that the second needs, without the constants, which all share."""
    nodes = list(graph)
    body: list[ir.Node] = []
    needed = [value for value in leave.inputs if value is not None]
    producers = {value.producer() for value in needed}
    for node in reversed(nodes[nodes.index(enter) + 1 : nodes.index(leave)]):
        if node in producers and node.op_type != "Constant":
            body.append(node)
            needed += [value for value in node.inputs if value is not None]
            producers.update(value.producer() for value in node.inputs if value is not None)
    inside = {enter, *body}
    for value in needed:
        source = value.producer()
        if source not in inside and not value.is_initializer() and (source is None or source.op_type != "Constant"):
            raise CheckpointError(
                f"{_text(enter, 'path')} takes {value.name} from elsewhere, so that it cannot be copied",
                fix="report this, with the checkpoint's config.json",
            )
    return body[::-1]


def _copy(graph: ir.Graph, again: ir.Node, enter: ir.Node, body: list[ir.Node], leave: ir.Node) -> None:
    """Replace one Again by a copy of the nodes between two marks."""
    path, first = _text(again, "path"), _text(again, "first")
    known: dict[ir.Value | None, ir.Value | None] = {None: None}
    known.update(zip(enter.outputs, again.inputs, strict=True))

    def value_of(value: ir.Value | None) -> ir.Value | None:
        if value not in known and value is not None:
            name = str(value.name).replace(f"{first}.", f"{path}.", 1)
            known[value] = own_weight(graph, value, name) if value.is_initializer() else value
        return known[value]

    made = []
    for node in body:
        inputs = [value_of(value) for value in node.inputs]
        made.append(copied(node, inputs, str(node.name).replace(first, path, 1)))
        known.update(zip(node.outputs, made[-1].outputs, strict=True))
    graph.insert_before(again, made)
    _replace(graph, again, [value for value in map(value_of, leave.inputs) if value is not None])


def copied(node: ir.Node, inputs: Sequence[ir.Value | None], name: str) -> ir.Node:
    """Return a node that does with other inputs what a node does."""
    attributes = list(node.attributes.values())
    copy = ir.Node(node.domain, node.op_type, inputs, attributes, num_outputs=len(node.outputs), name=name)
    for old, new in zip(node.outputs, copy.outputs, strict=True):
        new.shape, new.type = old.shape, old.type
    return copy


def own_weight(graph: ir.Graph, value: ir.Value, name: str) -> ir.Value:
    """Return a copy's own weight, of that name, in the place of `value`."""
    if name not in graph.initializers:
        graph.initializers[name] = ir.Value(
            name=name, shape=value.shape, type=value.type, const_value=value.const_value
        )
    return graph.initializers[name]


def _replace(graph: ir.Graph, node: ir.Node, values: list[ir.Value]) -> None:
    """Put values in the place of a node's outputs, and remove it."""
    for old, new in zip(node.outputs, values, strict=True):
        for index, output in enumerate(graph.outputs):
            if output is old:
                graph.outputs[index] = new
        old.replace_all_uses_with(new)
    graph.remove(node)
