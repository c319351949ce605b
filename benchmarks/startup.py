"""Measure what comes before the work: `--help`, the runtime's import, and the miniature from the shell to an mp4.

    python benchmarks/startup.py [--runs N] [--output benchmarks/results/startup]

Every figure is the wall time of a process of its own, from its start to its end; what is on disk has been read before.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from report import conditions, write

TOOLS = ("onnxruntime", "numpy", "av", "tokenizers", "click")
PROGRAM = (sys.executable, "-m", "cvx_deploy")
IMPORT = "import cvx_deploy.pipeline.run, cvx_deploy.engines.onnxruntime.backend"
STAGES = Path(__file__).with_name("startup_stages.py")

Seconds = list[float]
"""Of one thing, measured several times."""


def commands(video: Path) -> dict[str, list[str]]:
    """Return what is measured as a whole."""
    run = [*PROGRAM, "run", "--prompt", "a red circle moves to the right", "--output", str(video), "--quiet"]
    return {
        "python alone": [sys.executable, "-c", ""],
        "cvx-deploy --help": [*PROGRAM, "--help"],
        "cvx-deploy run --help": [*PROGRAM, "run", "--help"],
        "import of the runtime": [sys.executable, "-c", IMPORT],
        "cvx-deploy run": run,
    }


def seconds_of(command: list[str]) -> float:
    """Run a command to its end and return its wall time."""
    start = time.monotonic()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - start


def stages_of(video: Path) -> dict[str, float]:
    """Make the miniature's video once and return the seconds of each stage, the process's end among them."""
    start = time.monotonic()
    command = [sys.executable, str(STAGES), str(start), str(video)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    whole = time.monotonic() - start
    stages: dict[str, float] = json.loads(done.stdout)
    return stages | {"end of the process": whole - sum(stages.values())}


def measured(runs: int) -> tuple[dict[str, Seconds], dict[str, Seconds]]:
    """Return the seconds of every command and of every stage; one run more comes before, and is not counted."""
    whole: dict[str, Seconds] = {}
    stages: dict[str, Seconds] = {}
    with tempfile.TemporaryDirectory() as folder:
        video = Path(folder) / "video.mp4"
        for counted in [False] + [True] * runs:
            for found, name, seconds in (
                *((whole, name, seconds_of(command)) for name, command in commands(video).items()),
                *((stages, name, seconds) for name, seconds in stages_of(video).items()),
            ):
                if counted:
                    found.setdefault(name, []).append(round(seconds, 4))
    return whole, stages


def table(head: str, found: dict[str, Seconds]) -> list[str]:
    """Lay seconds out as lines of Markdown: median, smallest and largest."""
    rows = [f"| {head} | seconds | from | to |", "| --- | --- | --- | --- |"]
    for name, seconds in found.items():
        values = (statistics.median(seconds), min(seconds), max(seconds))
        rows.append(f"| {name} | {' | '.join(f'{value:.3f}' for value in values)} |")
    return rows


def main() -> None:
    """Read the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--note", default="nothing else ran", help="what else used the machine, for the report")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "startup")
    arguments = parser.parse_args()
    video = "the packaged miniature mini: 9x48x48, 50 steps, guidance 6, fp32, mp4"
    told = conditions(TOOLS, arguments.note, video=video, runs=arguments.runs, warm_up_runs=1)
    whole, stages = measured(arguments.runs)
    results: dict[str, Any] = {"commands": whole, "stages": stages}
    lines = ["# From the shell to a video", "", *table("process", whole), ""]
    lines += ["One more process that makes the same video, stage by stage:", "", *table("stage", stages)]
    write(arguments.output, told, results, lines)


if __name__ == "__main__":
    main()
