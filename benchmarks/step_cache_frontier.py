"""Draw quality over work: steps, policies and schedulers of the miniature, against its video of all steps.

    python benchmarks/step_cache_frontier.py [--count N] [--kept FILE] [--output results/step_cache_frontier]

Writes the figures, and `docs/step-cache.svg` of them. What is measured is kept, as in `step_cache.py`.
"""

import argparse
import io
import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import step_cache
from report import conditions, write
from step_cache import FULL, Plan, read_rows, run_plan, summary, table

from cvx_deploy.bench.plots import COLOURS
from cvx_deploy.pipeline.schedulers import SCHEDULERS

STEPS = 50
SPEEDUPS = (1.5, 2.0, 2.6, 3.3, 4.0, 5.0)
FEWER = (33, 25, 19, 15, 12, 10)
FAMILIES = {
    "steps forecast, of 50": re.compile(r"--cache-speedup"),
    "steps forecast, of fewer": re.compile(r"\d+ steps, --fast"),
    "fewer steps": re.compile(r"\d+ steps$"),
}


def cases(scheduler: str, steps: int) -> dict[str, dict[str, Any]]:
    """Return what is compared, as `step_cache.cases` does."""
    return {
        FULL: {},
        **{f"--cache-speedup {one:g}": {"cache": "fixed", "cache_speedup": one} for one in SPEEDUPS},
        **{f"{one} steps, --fast": {"num_inference_steps": one, "fast": True} for one in (33, 25)},
        **{f"{one} steps": {"num_inference_steps": one} for one in FEWER},
    }


def drawn(found: dict[str, Any], count: int) -> str:
    """Return the plot as SVG: median PSNR over calls, a line for each family, a panel for each scheduler."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    look: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": "frontier", "font.size": 9, "axes.grid": True}
    look |= {"axes.spines.top": False, "axes.spines.right": False, "grid.color": "#e4e4e4"}
    with mpl.rc_context(look):
        figure = Figure(figsize=(8.6, 3.6))
        for place, scheduler in enumerate(SCHEDULERS, 1):
            axes = figure.add_subplot(1, 2, place)
            for colour, (family, pattern) in zip(COLOURS, FAMILIES.items(), strict=False):
                told = found[f"mini, {scheduler}"].items()
                points = sorted(
                    (STEPS / one["work"], one["psnr"]["median"]) for case, one in told if pattern.match(case)
                )
                axes.plot(*zip(*points, strict=True), "o-", color=colour, markersize=4, linewidth=1, label=family)
            axes.axvline(STEPS / 2, color="#888888", linewidth=0.8, linestyle="--")
            axes.annotate("--fast", (STEPS / 2, axes.get_ylim()[1]), xytext=(3, -8), textcoords="offset points")
            axes.set_title(scheduler.upper(), fontsize=10)
            axes.set_xlabel("calls of the transformer")
            axes.set_ylabel(f"dB to the video of {STEPS} calls, median of {count}" if place == 1 else "")
        axes.legend(frameon=False, fontsize=8)
        figure.set_layout_engine("tight")
        held = io.StringIO()
        figure.savefig(held, format="svg", metadata={"Date": None, "Creator": None})
    return re.sub(r"<metadata>.*?</metadata>", "", held.getvalue(), flags=re.DOTALL)


def main() -> None:
    """Read the command line, measure what is not there yet, and write the figures and the plot."""
    root = Path(__file__).parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=12, help="held-out captions")
    parser.add_argument("--kept", type=Path, default=Path("outputs/step_cache_frontier.jsonl"))
    parser.add_argument("--output", type=Path, default=root / "results" / "step_cache_frontier")
    parser.add_argument("--plot", type=Path, default=root.parent / "docs" / "step-cache.svg")
    arguments = parser.parse_args()
    step_cache.cases = cases
    kept = read_rows(arguments.kept)
    arguments.kept.parent.mkdir(parents=True, exist_ok=True)
    with arguments.kept.open("a", encoding="utf-8") as file:
        for row in run_plan(Plan("mini", 0, arguments.count, STEPS, None, ()), 2.0, kept):
            kept[row.key] = row
            print(json.dumps(asdict(row)), file=file, flush=True)
    found = summary(kept.values(), STEPS)
    told = conditions(step_cache.TOOLS, "other programs ran beside it", steps=STEPS, guidance_scale=2.0, threads=1)
    write(arguments.output, told, {"results": found}, table(found))
    arguments.plot.write_text(drawn(found, arguments.count), encoding="utf-8")


if __name__ == "__main__":
    main()
