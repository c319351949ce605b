"""Where two forms of a network part: a bisection over its blocks, then node by node within the first that differs."""

import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from cvx_deploy.bundle.opened import Bundle
from cvx_deploy.engines.backend import Backend
from cvx_deploy.measure.difference import difference
from cvx_deploy.parity.cases import Case, run_cases

if TYPE_CHECKING:
    from cvx_deploy.exporters.sources.checkpoint import Checkpoint
    from cvx_deploy.graph.probe import Graph

Open = Callable[[Bundle], AbstractContextManager[Backend]]
Errors = Callable[[Sequence[str]], dict[str, float]]
_AT_ONCE = 16
_NAMED = 3


@dataclass(frozen=True)
class Layer:
    """A node at which two forms of a network put out different values.

    Attributes:
        name: The module it was traced from, and its operator.
        relative_l2: How far the two are apart.
    """

    name: str
    relative_l2: float


@dataclass(frozen=True)
class Side:
    """One of two graphs that are compared, and what opens a bundle on the engine that runs it."""

    graph: "Graph"
    open: Open

    def values(self, names: Sequence[str], case: Case) -> dict[str, NDArray[Any]]:
        """Return what some nodes put out."""
        with tempfile.TemporaryDirectory() as folder:
            probed = self.graph.probed(names, Path(folder) / "probed.onnx")
            with self.open(probed) as backend:
                [(_, outputs)] = run_cases(backend, self.graph.role, [case])
        return dict(zip(names, (outputs[point] for point in probed.points), strict=True))


def first_layers(good: Side, bad: Side, case: Case, limit: float) -> list[Layer]:
    """Return the first nodes of a network that put out other values in `bad` than in `good`.

    Args:
        good: The graph that is right.
        bad: The one that is not; nodes of the same name and operator in both are compared.
        case: What the network is given.
        limit: The relative L2 error from which values count as other ones.
    """
    from cvx_deploy.graph.probe import shared_nodes

    def errors(names: Sequence[str]) -> dict[str, float]:
        found, expected = (side.values(names, case) for side in (bad, good))
        return {name: difference(name, found[name], expected[name]).relative_l2 for name in names}

    return _first(shared_nodes(good.graph, bad.graph), errors, limit)


def first_modules(checkpoint: "Checkpoint", bad: Side, case: Case, limit: float) -> list[Layer]:
    """Return the first nodes of a traced graph that put out other values than the eager modules they were traced from.

    Compared is the last node of each module; see `cvx_deploy.exporters.reference.eager_layers` for those that can be.

    Args:
        checkpoint: Whose modules are right.
        bad: The graph, without rewrites.
        case: What the network is given.
        limit: The relative L2 error from which values count as other ones.
    """
    from cvx_deploy.exporters.reference.eager_layers import ListeningEager

    bundle, role = bad.graph.bundle, bad.graph.role
    told = ListeningEager(bundle, checkpoint, "fp32")
    list(run_cases(told, role, [case]))
    last = {name.rpartition("/")[0]: name for name in bad.graph.nodes}
    modules = {node: module for module, node in last.items() if module in told.shapes}

    def errors(names: Sequence[str]) -> dict[str, float]:
        eager = ListeningEager(bundle, checkpoint, "fp32", {modules[name] for name in names})
        list(run_cases(eager, role, [case]))
        found = bad.values(names, case)
        pairs = {name: (found[name], eager.values[modules[name]]) for name in names}
        return {
            name: difference(name, one, other).relative_l2
            for name, (one, other) in pairs.items()
            if one.size == other.size  # else the node is not what puts out the module's result
        }

    return _first([name for name in bad.graph.nodes if name in modules], errors, limit)


def _first(names: Sequence[str], errors: Errors, limit: float) -> list[Layer]:
    """Return the first names, in order, whose error is above a limit."""
    from cvx_deploy.graph.probe import segments

    cut = segments(names)
    low, high = 0, len(cut)
    while low < high:  # the first segment whose end differs; those after a difference inherit it
        middle = (low + high) // 2
        if max(errors(cut[middle][-_NAMED:]).values(), default=0.0) > limit:
            high = middle
        else:
            low = middle + 1
    return _within(cut[min(low, len(cut) - 1)] if cut else [], errors, limit)


def _within(names: list[str], errors: Errors, limit: float) -> list[Layer]:
    for start in range(0, len(names), _AT_ONCE):
        found = [Layer(name, error) for name, error in errors(names[start : start + _AT_ONCE]).items() if error > limit]
        if found:
            return found[:_NAMED]
    return []
