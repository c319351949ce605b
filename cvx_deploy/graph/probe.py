"""Inner tensors of an exported network made outputs, so that two graphs of it can be compared layer by layer."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import onnx

from cvx_deploy.bundle.opened import Bundle
from cvx_deploy.bundle.schema import Network, TensorSpec

_BLOCK = re.compile(r"^(.*?\.\d+)[./]")
_UNSEEN = {"Constant", "Identity", "Shape", "Size", "ConstantOfShape"}


@dataclass(frozen=True)
class Probed(Bundle):
    """A bundle, one of whose networks puts out inner tensors instead of its own outputs.

    Attributes:
        role: That network's.
        graph: Where its altered ONNX file lies.
        points: Names of its outputs.
    """

    role: str = ""
    graph: Path = Path()
    points: tuple[str, ...] = ()

    def onnx_path(self, role: str) -> Path:
        """Return where the ONNX file of a role's network lies."""
        return self.graph if role == self.role else super().onnx_path(role)

    def onnx_bytes(self, role: str) -> bytes:
        """Return the ONNX file of a role's network."""
        return self.graph.read_bytes() if role == self.role else super().onnx_bytes(role)

    def network(self, role: str) -> Network:
        """Return the network that plays a role."""
        described = super().network(role)
        if role != self.role:
            return described
        outputs = tuple(TensorSpec(name, "float32", (), "") for name in self.points)
        return replace(described, outputs=outputs, state={})


@dataclass(frozen=True)
class Graph:
    """One network's graph, for looking into.

    Attributes:
        bundle: Whose network it is, seen at a shape.
        role: Which network.
    """

    bundle: Bundle
    role: str

    @cached_property
    def model(self) -> onnx.ModelProto:
        """The graph without its weights."""
        return onnx.load(self.bundle.onnx_path(self.role), load_external_data=False)

    @cached_property
    def nodes(self) -> dict[str, onnx.NodeProto]:
        """Every node that works on what the network is given, by name, in order."""
        live = {value.name for value in self.model.graph.input}
        found: dict[str, onnx.NodeProto] = {}
        for node in self.model.graph.node:
            if not live.isdisjoint(node.input):
                live.update(node.output)
                if node.op_type not in _UNSEEN:
                    found[node.name] = node
        return found

    def probed(self, names: Iterable[str], file: Path) -> Probed:
        """Return the bundle with this network putting out what the named nodes put out, in float32, by their names."""
        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        points = []
        del model.graph.output[:]
        for name in names:
            cast = onnx.helper.make_node("Cast", [self.nodes[name].output[0]], [f"probe {name}"], to=1)
            model.graph.node.append(cast)
            model.graph.output.append(onnx.helper.make_tensor_value_info(f"probe {name}", 1, None))
            points.append(f"probe {name}")
        file.write_bytes(model.SerializeToString())
        fields: dict[str, Any] = {
            "path": self.bundle.path,
            "manifest": self.bundle.manifest,
            "index": self.bundle.index,
        }
        return Probed(**fields, role=self.role, graph=file, points=tuple(points))


def shared_nodes(first: Graph, second: Graph) -> list[str]:
    """Return the names of the nodes that two graphs of a network have in common, in the order of the first."""
    others = second.nodes
    return [name for name, node in first.nodes.items() if name in others and others[name].op_type == node.op_type]


def segments(names: Iterable[str]) -> list[list[str]]:
    """Cut nodes, in order, where another numbered block begins; what is in none goes with what is before it."""
    cut: list[list[str]] = []
    last = None
    for name in names:
        found = _BLOCK.match(name)
        block = found[1] if found else None
        if not cut or (block is not None and block != last):
            cut.append([])
        cut[-1].append(name)
        last = block or last
    return cut
