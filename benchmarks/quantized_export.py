"""Measure quantized exports at the published size: seconds, peak memory, and sizes beside those that are planned.

    python benchmarks/quantized_export.py --work DIR [--model 5b] [--output benchmarks/results/quantized_export]

`DIR` needs about 35 GB: the checkpoint, of random weights, is made there unless it is there, and stays. fp8 is
calibrated first, on one prompt at a small video size, which is enough to see what it costs. Memory is sampled every
20 ms.
"""

import argparse
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
from report import conditions, write

from cvx_deploy.bundle.opened import Bundle
from cvx_deploy.estimate.memory import PrecisionName, weight_bytes
from cvx_deploy.families.cogvideox.architecture import Architecture
from cvx_deploy.families.registry import MODELS

TOOLS = ("torch", "torchao", "diffusers", "transformers", "onnx-ir", "onnxscript")
PROGRAM = (sys.executable, "-m", "cvx_deploy")
SCHEMES: tuple[PrecisionName, ...] = ("int8wo", "fp8")
SMALL = ("--shape", "9x96x128", "--num-prompts", "1", "--steps", "3")


@dataclass(frozen=True)
class Cost:
    """What one command took.

    Attributes:
        resident: Largest resident memory in bytes, pages of mapped files included; `private` without those.
        sizes: Bytes of the weight files it wrote, by network.
        planned: What `cvx-deploy plan` says those networks' weights are.
    """

    seconds: float
    resident: int
    private: int
    sizes: dict[str, int]
    planned: dict[str, int]


def measure(*words: object) -> tuple[float, int, int]:
    """Run cvx-deploy, and return its seconds and its largest resident and private memory."""
    start, resident, private = time.perf_counter(), 0, 0
    process = psutil.Popen([*PROGRAM, *map(str, words), "--quiet"], stdout=subprocess.DEVNULL)
    while process.poll() is None:
        try:
            now = process.memory_info()
        except psutil.NoSuchProcess:
            break
        resident, private = max(resident, now.rss), max(private, now.rss - now.shared)
        time.sleep(0.02)
    if process.wait():
        raise subprocess.CalledProcessError(process.returncode, process.args)
    return time.perf_counter() - start, resident, private


def export(model: str, checkpoint: Path, scheme: PrecisionName, table: Path, output: Path) -> Cost:
    """Export once, and compare what was written with the plan."""
    words: list[object] = ["export", "--model", model, "--checkpoint", checkpoint, "--precision", scheme]
    if scheme == "fp8":
        words += ["--calibration", table, "--calibration-any-shape"]
    cost = measure(*words, "--output", output)
    bundle = Bundle.open(output)
    sizes = {name: _bytes(bundle, name) for name in ("transformer", "text_encoder")}
    known = weight_bytes(Architecture.of_model(MODELS[model]), scheme)
    shutil.rmtree(output)
    # The transformer's file holds the modulation network's weights, too.
    planned = {"transformer": known["transformer"] + known["modulation"], "text_encoder": known["text_encoder"]}
    return Cost(*cost, sizes, planned)


def _bytes(bundle: Bundle, network: str) -> int:
    return sum(bundle.manifest.weights[name].size for name in bundle.network(network).weights)


def table_of(model: str, results: dict[str, Cost]) -> Iterator[str]:
    """Yield the results, as lines of Markdown."""
    yield from (f"# Quantized exports of {model} at its published size", "")
    yield "| command | seconds | resident | of it private | transformer | planned | T5 | planned |"
    yield "| --- " * 8 + "|"
    for name, cost in results.items():
        sizes = [
            f"{of[part] / 1e9:.2f} GB" if part in of else ""
            for part in ("transformer", "text_encoder")
            for of in (cost.sizes, cost.planned)
        ]
        memory = [f"{size / 2**30:.2f} GiB" for size in (cost.resident, cost.private)]
        yield f"| {' | '.join([name, f'{cost.seconds:.0f}', *memory, *sizes])} |"


def main(words: Sequence[str] | None = None) -> None:
    """Read the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="a folder with 35 GB of room")
    parser.add_argument("--model", choices=list(MODELS), default="5b")
    parser.add_argument("--note", default="nothing else ran", help="what else used the machine, for the report")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "quantized_export")
    arguments = parser.parse_args(words)
    arguments.work.mkdir(parents=True, exist_ok=True)
    checkpoint, table = arguments.work / f"{arguments.model}-full", arguments.work / "calibration.safetensors"
    if not checkpoint.exists():
        measure("synth", "--like", arguments.model, "--scale", "full", "--output", checkpoint)
    told: dict[str, Any] = conditions(
        TOOLS, arguments.note, model=arguments.model, runs=1, calibration=" ".join(SMALL), checkpoint="random weights"
    )
    results: dict[str, Cost] = {}

    def keep(name: str, cost: Cost) -> None:
        results[name] = cost
        print(f"{name}: {cost}", file=sys.stderr)
        content = {"commands": {command: asdict(one) for command, one in results.items()}}
        write(arguments.output, told, content, table_of(arguments.model, results))

    for scheme in SCHEMES:
        if scheme == "fp8":
            table.unlink(missing_ok=True)
            observed = measure(
                "quantize", "--model", arguments.model, "--checkpoint", checkpoint, *SMALL, "--output", table
            )
            keep("quantize", Cost(*observed, {}, {}))
        keep(f"export {scheme}", export(arguments.model, checkpoint, scheme, table, arguments.work / scheme))


if __name__ == "__main__":
    main()
