"""Measure the miniature on this machine and put the result into the README, between its two marks.

    python benchmarks/readme.py [--keep]

With ``--keep`` nothing is measured: the README gets the table of the committed results, and these their other forms.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from cvx_deploy.bench.html import page
from cvx_deploy.bench.markdown import report, summary
from cvx_deploy.bench.results import BenchResults, read_results

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "benchmarks" / "results" / "bench-mini"
BEGIN, END = "<!-- bench: begin, made by benchmarks/readme.py -->", "<!-- bench: end -->"
ENGINES = ("onnxruntime", "openvino")


def measure() -> None:
    """Run the benchmark, which writes its three forms."""
    engines = [word for engine in ENGINES for word in ("--engine", engine)]
    command = [sys.executable, "-m", "cvx_deploy", "bench", "--model", "mini", *engines, "--output", str(FOLDER)]
    subprocess.run([*command, "--quiet"], check=True, stdout=sys.stderr)


def forms(results: BenchResults) -> dict[str, str]:
    """Return what a person reads of some results, by file name."""
    return {"bench.md": report(results), "bench.html": page(results)}


def block(results: BenchResults) -> str:
    """Return what stands between the marks."""
    told, table = results.conditions, summary(results)
    versions = ", ".join(f"{tool} {version}" for tool, version in told["versions"].items() if tool != "cvx-deploy")
    machine = f"{told['cpu']}, {told['cores']} cores, {told['memory_bytes'] / 2**30:.0f} GiB, no GPU used"
    video = f"`{results.model}`, {results.shape}, {results.precision}, seed {told['video']['seed']}"
    said = f"{video}. {table.note} {machine}; Python {told['python']}, {versions}; {told['date']}."
    return "\n".join([BEGIN, "", *table.lines(), "", said, "", END])


def with_block(readme: str, results: BenchResults) -> str:
    """Return the README with the results between its marks."""
    before, _, rest = readme.partition(BEGIN)
    return before + block(results) + rest.partition(END)[2]


def main() -> None:
    """Read the command line, measure unless told not to, and write the README."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", action="store_true", help="measure nothing")
    if not parser.parse_args().keep:
        measure()
    results = read_results(FOLDER / "bench.json")
    for name, text in forms(results).items():
        (FOLDER / name).write_text(text, encoding="utf-8")
    readme = ROOT / "README.md"
    readme.write_text(with_block(readme.read_text(encoding="utf-8"), results), encoding="utf-8")


if __name__ == "__main__":
    main()
