"""The plots of a benchmark, each an SVG element without any reference to the outside."""

import io
import re
import statistics
from collections.abc import Callable
from typing import Any

from cvx_deploy.bench.results import BenchResults, Peer, stage_names

COLOURS = ("#3366aa", "#dd8833", "#339977", "#aa4466", "#8866bb", "#77777a", "#bbaa33", "#44aacc")
_WIDTH = 8.6  # inches, at 72 of the page's pixels each


def latency(results: BenchResults) -> str:
    """Draw the seconds of each stage, a bar for each peer."""

    def draw(axes: Any) -> None:
        names = [peer.name for peer in results.peers]
        left = [0.0] * len(names)
        for colour, stage in zip(COLOURS, stage_names(results.peers), strict=False):
            taken = [statistics.median([run.stages.get(stage, 0.0) for run in peer.runs]) for peer in results.peers]
            axes.barh(names, taken, left=left, label=stage, color=colour, height=0.55)
            left = [start + length for start, length in zip(left, taken, strict=True)]
        for row, peer in enumerate(results.peers):
            whole = [run.seconds for run in peer.runs]
            middle = statistics.median(whole)
            axes.errorbar(left[row], row, xerr=[[max(left[row] - min(whole), 0)], [max(max(whole) - left[row], 0)]],
                          color="#333333", capsize=3, linewidth=1)  # fmt: skip
            axes.annotate(f"{middle:.3g} s", (max(max(whole), left[row]), row), xytext=(6, 0), va="center",
                          textcoords="offset points")  # fmt: skip
        axes.invert_yaxis()
        axes.set_xlim(right=axes.get_xlim()[1] * 1.08)
        axes.set_xlabel("seconds, medians; whiskers: the range of the runs")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.34), ncols=4, frameon=False)

    return _svg("latency", 1.5 + 0.45 * len(results.peers), draw)


def memory(results: BenchResults) -> str:
    """Draw the memory of each peer over its last run: a line for what is resident, a broken one for what is private."""
    on_gpu = any(sample[3] for peer in results.peers for sample in peer.memory)

    def draw(axes: Any) -> None:
        for colour, peer in zip(COLOURS, results.peers, strict=False):
            moments = [sample[0] for sample in peer.memory]
            axes.plot(moments, _giga(peer, 1), color=colour, label=f"{peer.name}, resident")
            axes.plot(moments, _giga(peer, 2), color=colour, linestyle="--", label=f"{peer.name}, private")
            if on_gpu:
                axes.plot(moments, _giga(peer, 3), color=colour, linestyle=":", label=f"{peer.name}, GPU")
            end = peer.stage_ends.get("transformer")
            if end is not None:
                axes.axvline(end, color=colour, linewidth=0.7, alpha=0.6)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("seconds; thin lines: denoising ends")
        axes.set_ylabel("GB")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=3, frameon=False)

    return _svg("memory", 3.6, draw)


def quality(results: BenchResults) -> str:
    """Draw each peer's PSNR against the reference over its videos an hour."""

    def draw(axes: Any) -> None:
        for index, (colour, peer) in enumerate(zip(COLOURS, results.peers, strict=False)):
            speed = 3600 / statistics.median([run.seconds for run in peer.runs])
            if peer.psnr is None:
                axes.axvline(speed, color=colour, linewidth=1, linestyle="--")
                axes.annotate(f"{peer.name} (reference)", (speed, 0.03), xycoords=("data", "axes fraction"),
                              xytext=(5, 0), textcoords="offset points", color=colour)  # fmt: skip
            else:
                axes.plot([speed], [peer.psnr], "o", markersize=8, color=colour)
                # above and below by turns: peers of one speed keep their names apart, and off the reference's line
                place = {"xytext": (0, 9), "va": "bottom"} if index % 2 else {"xytext": (0, -9), "va": "top"}
                backing = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
                axes.annotate(peer.name, (speed, peer.psnr), textcoords="offset points", ha="center",
                              bbox=backing, **place)  # fmt: skip
        axes.set_ylim(0, axes.get_ylim()[1] * 1.15)
        axes.set_xlim(0, axes.get_xlim()[1] * 1.25)
        axes.set_xlabel("videos an hour")
        axes.set_ylabel(f"PSNR against {results.reference}, dB")

    return _svg("quality", 3.0, draw)


def _giga(peer: Peer, column: int) -> list[float]:
    return [sample[column] / 1e9 for sample in peer.memory]


def _svg(name: str, height: float, draw: Callable[[Any], None]) -> str:
    """Return a figure as an SVG element; its text stays text, in the page's own font."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    settings: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": name,  # the identifiers of several figures in a page must differ
        "font.family": "sans-serif",
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": "#888888",
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": "#e4e4e4",
    }
    with mpl.rc_context(settings):
        figure = Figure(figsize=(_WIDTH, height))
        draw(figure.add_subplot())
        drawn = io.StringIO()
        figure.savefig(drawn, format="svg", bbox_inches="tight", metadata={"Date": None, "Creator": None})
    svg = re.sub(r"<metadata>.*?</metadata>", "", drawn.getvalue(), flags=re.DOTALL)
    return svg[svg.index("<svg") :]
