"""Where two forms of a network part: a bisection over its blocks, then node by node within the first that differs."""

import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from cvx_deploy.bundle import Bundle
from cvx_deploy.report.cases import Case, run_cases
from cvx_deploy.report.difference import difference
from cvx_deploy.runtime.backend import Backend

if TYPE_CHECKING:
    from cvx_deploy.graph.probe import Graph

Open = Callable[[Bundle], AbstractContextManager[Backend]]
_AT_ONCE = 16
_NAMED = 3


@dataclass(frozen=True)
class Layer:
    """A node at which two graphs put out different values.

    Attributes:
        name: The module it was traced from, and its operator.
        relative_l2: How far the two are apart.
    """

    name: str
    relative_l2: float


def first_layers(good: "Graph", bad: "Graph", open_: Open, case: Case, limit: float) -> list[Layer]:
    """Return the first nodes of a network that put out other values in `bad` than in `good`.

    Args:
        good: The graph that is right.
        bad: The graph that is not.
        open_: Opens a bundle on the engine that runs both.
        case: What the network is given.
        limit: The relative L2 error from which values count as other ones.
    """
    from cvx_deploy.graph.probe import segments, shared_nodes

    def errors(names: Sequence[str]) -> dict[str, float]:
        found, expected = (_values(graph, open_, names, case) for graph in (bad, good))
        return {name: difference(name, found[name], expected[name]).relative_l2 for name in names}

    cut = segments(shared_nodes(good, bad))
    low, high = 0, len(cut)
    while low < high:  # the first segment whose end differs; those after a difference inherit it
        middle = (low + high) // 2
        if max(errors(cut[middle][-_NAMED:]).values()) > limit:
            high = middle
        else:
            low = middle + 1
    return _within(cut[min(low, len(cut) - 1)] if cut else [], errors, limit)


def _within(names: list[str], errors: Callable[[Sequence[str]], dict[str, float]], limit: float) -> list[Layer]:
    for start in range(0, len(names), _AT_ONCE):
        found = [Layer(name, error) for name, error in errors(names[start : start + _AT_ONCE]).items() if error > limit]
        if found:
            return found[:_NAMED]
    return []


def _values(graph: "Graph", open_: Open, names: Sequence[str], case: Case) -> dict[str, NDArray[Any]]:
    """Return what some nodes put out."""
    with tempfile.TemporaryDirectory() as folder:
        probed = graph.probed(names, Path(folder) / "probed.onnx")
        with open_(probed) as backend:
            [(_, outputs)] = run_cases(backend, graph.role, [case])
    return dict(zip(names, (outputs[point] for point in probed.points), strict=True))
