"""A deep network from a trace of four of its blocks.

CogVideoX's transformer is 30 or 42 equal blocks, T5-XXL 24. Tracing a block takes a second or more, copying a traced
one milliseconds. So four are traced: the first, which may hold what all share, two from the middle, and the last,
parts of which may be dead. The second of the middle ones is repeated. The two together say, node by node, what a block
takes from the block before it, what from outside, and which weights are its own; where they are not alike to the last
node and attribute, nothing is guessed. What a Split outside hands out piece by piece, as many to each block, is shared
out on to the blocks that follow.
"""

from dataclasses import dataclass

import onnx_ir as ir

from cvx_deploy.errors import CheckpointError
from cvx_deploy.exporters.tracing.copies import copied, own_weight

TRACED = 4
_BEFORE, _TEMPLATE, _LAST = 1, 2, 3


@dataclass(frozen=True)
class Blocks:
    """A run of equal blocks.

    Attributes:
        path: The module list that holds them, such as ``model.transformer_blocks``.
        count: How many the network has.
    """

    path: str
    count: int

    @property
    def traced(self) -> int:
        """How many to trace."""
        return min(self.count, TRACED)


def repeat_blocks(model: ir.Model, blocks: Blocks) -> None:
    """Extend a graph that was traced with `TRACED` blocks to all of them, in place.

    Nodes must be named by module, and weights by parameter.

    Raises:
        CheckpointError: The traced blocks differ, so that the network is not a run of equal blocks.
    """
    if blocks.count <= TRACED:
        return
    before, template = (_nodes_of(model.graph, f"{blocks.path}.{index}") for index in (_BEFORE, _TEMPLATE))
    _rename(model.graph, f"{blocks.path}.{_LAST}", f"{blocks.path}.{blocks.count - 1}")
    repeater = _Repeater(model.graph, blocks, before, template)
    made = [repeater.add(index) for index in range(_LAST, blocks.count - 1)]
    for old, new in zip(_values(template), _values(made[-1]), strict=True):
        for usage in list(old.uses()):
            if usage.node not in repeater.inside:
                usage.node.replace_input_with(usage.idx, new)


def _rename(graph: ir.Graph, old: str, new: str) -> None:
    """Move a block's nodes and weights to another index."""
    for node in _nodes_of(graph, old):
        node.name = str(node.name).replace(old, new, 1)
    for name in [name for name in graph.initializers if name.startswith(f"{old}.")]:
        value = graph.initializers.pop(name)
        value.name = name.replace(old, new, 1)
        graph.initializers.add(value)


def _nodes_of(graph: ir.Graph, module: str) -> list[ir.Node]:
    return [node for node in graph if node.name is not None and node.name.startswith((f"{module}.", f"{module}/"))]


def _values(nodes: list[ir.Node]) -> list[ir.Value]:
    return [output for node in nodes for output in node.outputs]


class _Repeater:
    """Copies of the template, each fed by the one before it."""

    def __init__(self, graph: ir.Graph, blocks: Blocks, before: list[ir.Node], template: list[ir.Node]) -> None:
        self.graph = graph
        self.path = blocks.path
        self.template = template
        self.end = template[-1]
        self.previous = template
        self.inside = set(template)
        twins = dict(zip(_values(before), _values(template), strict=True)) if len(before) == len(template) else {}
        if not twins or not all(map(self._alike, before, template)):
            raise self._refusal()
        self._strides: dict[ir.Value, int] = {}
        self._carried = self._what_is_carried(before, twins)

    def _alike(self, first: ir.Node, second: ir.Node) -> bool:
        return (
            first.op_identifier() == second.op_identifier()
            and len(first.inputs) == len(second.inputs)
            and {name: repr(value.value) for name, value in first.attributes.items() if name != "value"}
            == {name: repr(value.value) for name, value in second.attributes.items() if name != "value"}
            and _constant_bytes(first) == _constant_bytes(second)
        )

    def _what_is_carried(self, before: list[ir.Node], twins: dict[ir.Value, ir.Value]) -> dict[ir.Value, ir.Value]:
        """Map every value that the template takes from the block before it to the template's own of that kind."""
        carried: dict[ir.Value, ir.Value] = {}
        own = set(twins.values())
        for first, second in zip(before, self.template, strict=True):
            for mine, yours in zip(second.inputs, first.inputs, strict=True):
                if mine is None or yours is None or mine in own or mine.is_initializer():
                    if mine is not None and yours is not None and mine in own and twins.get(yours) is not mine:
                        raise self._refusal()
                elif mine in twins:
                    carried[mine] = twins[mine]
                elif mine is not yours:
                    self._strides[mine] = self._stride(yours, mine)
        return carried

    def _stride(self, yours: ir.Value, mine: ir.Value) -> int:
        """Return how many pieces further on a block finds its own, of those that one node hands out."""
        source, first, second = mine.producer(), yours.index(), mine.index()
        if source is None or source is not yours.producer() or source.op_type != "Split":
            raise self._refusal()
        assert first is not None
        assert second is not None
        return second - first

    def add(self, index: int) -> list[ir.Node]:
        """Append block `index` after the last one and return its nodes."""
        ahead = dict(zip(_values(self.template), _values(self.previous), strict=True))
        copies: dict[ir.Value, ir.Value] = {}
        made = []
        for node in self.template:
            inputs = [self._input(value, index, copies, ahead) for value in node.inputs]
            made.append(copied(node, inputs, self._renamed(node.name, index)))
            copies.update(zip(node.outputs, made[-1].outputs, strict=True))
        self.graph.insert_after(self.end, made)
        self.end, self.previous = made[-1], made
        self.inside.update(made)
        return made

    def _input(
        self,
        value: ir.Value | None,
        index: int,
        copies: dict[ir.Value, ir.Value],
        ahead: dict[ir.Value, ir.Value],
    ) -> ir.Value | None:
        if value is None:
            return None
        if value in copies:
            return copies[value]
        if value in self._carried:
            return ahead[self._carried[value]]
        if value in self._strides:
            return self._piece(value, index)
        return own_weight(self.graph, value, self._renamed(value.name, index)) if value.is_initializer() else value

    def _piece(self, value: ir.Value, index: int) -> ir.Value:
        source, place = value.producer(), value.index()
        assert source is not None
        assert place is not None
        return source.outputs[place + (index - _TEMPLATE) * self._strides[value]]

    def _renamed(self, name: str | None, index: int) -> str:
        return str(name).replace(f"{self.path}.{_TEMPLATE}", f"{self.path}.{index}", 1)

    def _refusal(self) -> CheckpointError:
        return CheckpointError(
            f"the blocks of {self.path} are not alike, so they cannot be repeated from {TRACED} of them",
            fix="report this, with the checkpoint's config.json",
        )


def _constant_bytes(node: ir.Node) -> bytes | None:
    value = node.attributes.get("value")
    return value.value.tobytes() if value is not None and isinstance(value.value, ir.TensorProtocol) else None
