"""Results of several benchmarks side by side, and what got worse by more than the runs differ among themselves."""

import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from cvx_deploy.bench.markdown import Table, figure
from cvx_deploy.bench.results import BenchResults, Metric, metrics

Verdict = Literal["better", "worse", "within the spread"]
_NO_SPREAD = 0.02
"""The least relative change that counts: figures that are taken once, such as sizes, have no spread of their own."""


@dataclass(frozen=True)
class Change:
    """One figure of one peer, in the first results and in others.

    Attributes:
        file: The others'.
        before: The median in the first results; `after` in the others.
    """

    peer: str
    metric: str
    file: str
    before: float
    after: float
    verdict: Verdict

    def __str__(self) -> str:
        return f"{self.peer}: {self.metric} in {self.file}"


@dataclass(frozen=True)
class Comparison:
    """What `compare` found.

    Attributes:
        changes: Every figure that both have.
        conditions: What the figures were taken on that is not the same, a value for each file.
    """

    files: tuple[str, ...]
    changes: tuple[Change, ...]
    conditions: dict[str, tuple[Any, ...]]
    table: Table

    @property
    def regressions(self) -> list[Change]:
        """What got worse."""
        return [change for change in self.changes if change.verdict == "worse"]

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain values."""
        changes = [asdict(change) for change in self.changes]
        return {"files": self.files, "conditions": self.conditions, "changes": changes}

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        yield from self.table.lines()
        if self.conditions:
            yield "\nwhat they were taken on differs:"
            for name, values in self.conditions.items():
                yield f"- {name}: {', '.join(json.dumps(value) for value in values)}"
        yield f"\n{len(self.regressions)} of {len(self.changes)} figures got worse by more than the runs' spread"


def compare(named: Sequence[tuple[str, BenchResults]]) -> Comparison:
    """Compare the first results with each of the others, peer by peer and figure by figure."""
    (_, base), *others = named
    changes: list[Change] = []
    rows = [["", "", *(name for name, _ in named)]]
    for peer in base.peers:
        for metric in metrics(base.peers):
            before = metric.values(peer)
            if not before:
                continue
            cells = [figure(metric, statistics.median(before))]
            for name, results in others:
                found = results.peer(peer.name)
                after = metric.values(found) if found else []
                cells.append("-")
                if after:
                    changes.append(_change(peer.name, metric, name, before, after))
                    cells[-1] = _cell(metric, changes[-1])
            rows.append([peer.name, metric.name, *cells])
    table = Table("Comparison", "Medians; a verdict where the runs' ranges do not overlap.", rows)
    return Comparison(tuple(name for name, _ in named), tuple(changes), _differing(named), table)


def _change(peer: str, metric: Metric, file: str, before: list[float], after: list[float]) -> Change:
    old, new = statistics.median(before), statistics.median(after)
    apart = max(after) < min(before) or min(after) > max(before)
    verdict: Verdict = "within the spread"
    if apart and abs(new - old) > _NO_SPREAD * abs(old):
        verdict = "better" if (new < old) == (metric.better == "less") else "worse"
    return Change(peer, metric.name, file, old, new, verdict)


def _cell(metric: Metric, change: Change) -> str:
    relative = f"{(change.after / change.before - 1) * 100:+.0f}%" if change.before else "new"
    word = "" if change.verdict == "within the spread" else f", {change.verdict}"
    return f"{figure(metric, change.after)} ({relative}{word})"


def _differing(named: Sequence[tuple[str, BenchResults]]) -> dict[str, tuple[Any, ...]]:
    told = [{"model": one.model, "precision": one.precision, "shape": one.shape, **one.conditions} for _, one in named]
    ignored = {"date", "time", "load_average_at_start"}
    names = [name for name in told[0] if name not in ignored]
    values = {name: tuple(one.get(name) for one in told) for name in names}
    return {name: found for name, found in values.items() if any(value != found[0] for value in found)}
