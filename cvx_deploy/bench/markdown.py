"""The results of a benchmark as Markdown, and the tables that the HTML page shows too."""

import json
import statistics
from collections.abc import Iterator
from dataclasses import dataclass

from cvx_deploy.bench.results import (
    BenchResults,
    Metric,
    Peer,
    gpu_peak,
    joules,
    private_peak,
    resident_peak,
    stage_names,
    step_seconds,
)
from cvx_deploy.measure.units import size_text, time_text

_NONE = "-"


@dataclass(frozen=True)
class Table:
    """Rows of words under heads; `note` says what they are of."""

    title: str
    note: str
    rows: list[list[str]]

    def lines(self) -> Iterator[str]:
        """Yield it as Markdown."""
        head, *rows = self.rows
        yield f"| {' | '.join(head)} |"
        yield "| --- " * len(head) + "|"
        yield from (f"| {' | '.join(row)} |" for row in rows)


def report(results: BenchResults, *, short: bool = False) -> str:
    """Return the results as Markdown; short, the first table alone."""
    if short:
        return "\n".join(summary(results).lines())
    lines = [f"# {title(results)}", ""]
    for table in tables(results):
        lines += [f"## {table.title}", "", table.note, "", *table.lines(), ""]
    if results.not_measured:
        lines += ["## Not measured", "", *(f"- {name}: {why}" for name, why in results.not_measured.items()), ""]
    lines += ["## How the figures were taken", "", *(f"- {what}: {how}" for what, how in results.methods.items()), ""]
    lines += ["## Conditions", "", "```json", json.dumps(results.conditions, indent=2), "```", ""]
    return "\n".join(lines)


def title(results: BenchResults) -> str:
    """Return what was measured, in a line."""
    return f"{results.model} at {results.shape}, {results.precision}"


def tables(results: BenchResults) -> list[Table]:
    """Return every table of the results."""
    forecasts = [_forecasts(results)] if any(peer.forecast for peer in results.peers) else []
    return [summary(results), *forecasts, _stages(results), _memory(results), _places(results)]


def summary(results: BenchResults) -> Table:
    """Return one row a peer, with the figures that decide."""
    head = ["", "seconds a video, warm", "speed-up", "cold", "videos an hour", "first frame", "step p50", "step p95"]
    head += ["host peak", "private"]
    on_gpu = any(map(gpu_peak, results.peers))
    head += ["GPU peak", "energy"] if on_gpu else []
    rows = [[*head, "PSNR"]]
    for peer in results.peers:
        taken = [run.seconds for run in peer.runs]
        speed = "reference" if peer.name == results.reference else ratio(results.speedup(peer))
        row = [peer.name, spread(taken), speed, _time(peer.cold_seconds), f"{3600 / statistics.median(taken):,.0f}"]
        row += [_time(peer.median(lambda its: [run.first_frame for run in its.runs]))]
        row += [_time(peer.median(step_seconds(percent))) for percent in (50, 95)]
        row += [_size(peer.median(values)) for values in (resident_peak, private_peak)]
        if on_gpu:
            used = peer.median(joules)
            row += [_size(peer.median(gpu_peak)), _NONE if used is None else f"{used:,.0f} J"]
        rows.append([*row, _NONE if peer.psnr is None else f"{peer.psnr:.1f} dB"])
    steps, runs = results.conditions["video"]["steps"], results.conditions["runs"]
    rounds = "interleaved rounds" if results.conditions.get("interleaved", True) else "runs, one peer after another,"
    note = (
        f"{runs} {rounds} of {steps} steps after one that is not counted; medians, in brackets the range. "
        "Cold is from a process that runs to its first video, with all that is opened and loaded."
    )
    return Table("A video", note, rows)


def _forecasts(results: BenchResults) -> Table:
    rows = [["", "against", "PSNR", "SSIM", "flicker", "limits for forecast steps"]]
    for peer in results.peers:
        one = peer.forecast
        if one is not None:
            figures = [f"{one.psnr:.1f} dB", f"{one.ssim:.5f}", f"{one.flicker:.1e}"]
            rows.append([peer.name, one.against, *figures, "; ".join(one.broken) or "hold"])
    note = "Held against the full run of the same engine and seed, by limits of its own: no parity with the reference."
    return Table("Steps forecast", note, rows)


def _stages(results: BenchResults) -> Table:
    rows = [["stage", *(peer.name for peer in results.peers)]]
    for stage in stage_names(results.peers):
        of_stage = ([run.stages[stage] for run in peer.runs if stage in run.stages] for peer in results.peers)
        rows.append([stage, *(spread(taken) if taken else _NONE for taken in of_stage)])
    rows.append(["opening, once", *(_time(peer.open_seconds) for peer in results.peers)])
    return Table("Seconds by stage", "`load` is what networks take to load within a run.", rows)


def _memory(results: BenchResults) -> Table:
    stages = [stage for stage in stage_names(results.peers) if stage != "load"]
    rows = [["stage", *(peer.name for peer in results.peers)]]
    for stage in stages:
        rows.append([stage, *(_peaks(peer, stage) for peer in results.peers)])
    return Table("Peak memory by stage", "Resident, and after it what is private; on a GPU, its memory third.", rows)


def _peaks(peer: Peer, stage: str) -> str:
    figures = [[getattr(run, kind).get(stage) for run in peer.runs] for kind in ("resident", "private", "gpu")]
    known = [statistics.median(values) for values in figures if None not in values]
    return " / ".join(map(size_text, known)) or _NONE


def _places(results: BenchResults) -> Table:
    rows = [["", "what it is", "on disk", "build"]]
    for peer in results.peers:
        sizes = ", ".join(f"{size_text(size)} of {what}" for what, size in peer.sizes.items() if size)
        build = ", ".join(f"{network} {time_text(seconds)}" for network, seconds in peer.build_seconds.items())
        rows.append([peer.name, peer.what, sizes, build or "none needed"])
    return Table("What is compared", "Sizes on disk, and what was built beforehand.", rows)


def spread(seconds: list[float]) -> str:
    """Return the median of some seconds and their range."""
    if len(seconds) == 1:
        return time_text(seconds[0])
    middle = statistics.median(seconds)
    factor, unit = (1, "s") if middle >= 1 else (1000, "ms")
    least, most = (f"{value * factor:.3g}" for value in (min(seconds), max(seconds)))
    return f"{middle * factor:.3g} {unit} ({least} to {most})"


def ratio(speed: tuple[float, float, float]) -> str:
    """Return a speed-up and its range."""
    return f"{speed[0]:.2f} ({speed[1]:.2f} to {speed[2]:.2f})"


def figure(metric: Metric, value: float) -> str:
    """Return a figure in its unit."""
    if metric.unit == "seconds":
        return time_text(value)
    return size_text(value) if metric.unit == "bytes" else f"{value:,.1f} {'J' if metric.unit == 'joules' else 'dB'}"


def _time(seconds: float | None) -> str:
    return _NONE if seconds is None else time_text(seconds)


def _size(count: float | None) -> str:
    return _NONE if count is None else size_text(count)
