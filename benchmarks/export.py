"""Measure exports at the published sizes: seconds, peak memory and bytes written, on checkpoints of random weights.

    python benchmarks/export.py --work DIR [--models 2b 5b ...] [--runs N] [--output benchmarks/results/export]

`DIR` needs about 25 GB: each checkpoint is made there, exported `--runs` times, verified, and removed. For comparison,
plain `torch.onnx.export` takes a 5b transformer of 1 and of 3 blocks, which shows what each block costs it.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from report import conditions, write

from cvx_deploy.families.registry import MODELS

TOOLS = ("torch", "diffusers", "transformers", "onnx-ir", "onnxscript", "optimum")
PLAIN_DEPTHS = (1, 3)
# A shape of few tokens: the size of the video hardly changes what a trace costs.
PLAIN = """
import sys, torch
from diffusers import CogVideoXTransformer3DModel
depth, output = int(sys.argv[1]), sys.argv[2]
network = CogVideoXTransformer3DModel(
    num_attention_heads=48, attention_head_dim=64, num_layers=depth, use_rotary_positional_embeddings=True).eval()
tokens = 3 * 8 * 8
inputs = dict(
    hidden_states=torch.zeros(2, 3, 16, 16, 16), encoder_hidden_states=torch.zeros(2, 226, 4096),
    timestep=torch.zeros(2, dtype=torch.int64), image_rotary_emb=(torch.zeros(tokens, 64), torch.zeros(tokens, 64)))
torch.onnx.export(network, (), output, kwargs=inputs, dynamo=True, external_data=True, verbose=False)
print(sum(p.numel() for p in network.parameters()), file=sys.stderr)
"""


@dataclass(frozen=True)
class Measured:
    """One command's cost; bytes are whole where they were measured, but may have fractions where extrapolated.

    Attributes:
        seconds: Wall time of the whole process.
        peak_bytes: Its largest resident memory.
        written_bytes: What lies at its output afterwards.
    """

    seconds: float
    peak_bytes: float
    written_bytes: float


@dataclass(frozen=True)
class Graph:
    """What `cvx-deploy verify` says of one network: how many nodes and weights it has, and what is wrong with it."""

    nodes: int
    weights: int
    findings: list[str]


@dataclass(frozen=True)
class ModelCost:
    """What a model's exports took.

    Attributes:
        checkpoint_bytes: Size of what was exported.
        seconds: Wall time of each export.
        peak_bytes: Largest resident memory of them all.
        written_bytes: Size of the last bundle.
        networks: The bundle's graphs, by name.
    """

    checkpoint_bytes: int
    seconds: list[float]
    peak_bytes: float
    written_bytes: float
    networks: dict[str, Graph]


@dataclass(frozen=True)
class PlainCost:
    """What plain `torch.onnx.export` took, by the transformer's blocks, and what all blocks would take."""

    measured: dict[str, Measured]
    extrapolated: Measured


def measure(command: Sequence[str | Path], output: Path) -> Measured:
    """Run a command to its end in a process of its own.

    Raises:
        subprocess.CalledProcessError: It failed; what it said stands on stderr.
    """
    start = time.perf_counter()
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(list(map(str, command)), stdout=said, stderr=said)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            said.seek(0)
            sys.stderr.write(said.read().decode(errors="replace"))
            raise subprocess.CalledProcessError(process.returncode, process.args)
    return Measured(seconds, usage.ru_maxrss * 1024, bytes_at(output))


def bytes_at(place: Path) -> int:
    """Count the bytes of all files under `place`, each once."""
    files = {path.stat().st_ino: path.stat().st_size for path in place.rglob("*") if path.is_file()}
    return sum(files.values())


def measure_model(name: str, work: Path, runs: int) -> ModelCost:
    """Make a model's checkpoint, export it `runs` times, and say what that took."""
    program = [sys.executable, "-m", "cvx_deploy"]
    checkpoint, bundle = work / name, work / f"{name}-bundle"
    if not checkpoint.exists():
        made: list[str | Path] = [*program, "synth", "--like", name, "--scale", "full"]
        made += ["--output", checkpoint, "--quiet"]
        subprocess.run(made, check=True, stdout=subprocess.DEVNULL)
    export: list[str | Path] = [*program, "export", "--model", name, "--checkpoint", checkpoint]
    export += ["--output", bundle, "--quiet"]
    measured = []
    for _ in range(runs):
        shutil.rmtree(bundle, ignore_errors=True)
        measured.append(measure(export, bundle))
        print(f"{name}: {measured[-1]}", file=sys.stderr)
    cost = ModelCost(
        checkpoint_bytes=bytes_at(checkpoint),
        seconds=[round(one.seconds, 1) for one in measured],
        peak_bytes=max(one.peak_bytes for one in measured),
        written_bytes=measured[-1].written_bytes,
        networks=verified(bundle),
    )
    shutil.rmtree(checkpoint)
    shutil.rmtree(bundle)
    return cost


def verified(bundle: Path) -> dict[str, Graph]:
    """Return what `cvx-deploy verify` says of a bundle, without hashing the weights again; it must be sound."""
    command = [sys.executable, "-m", "cvx_deploy", "verify", "--bundle", bundle, "--quick", "--json", "--quiet"]
    done = subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True)
    networks = json.loads(done.stdout)["networks"]
    return {name: Graph(one["nodes"], one["weights"], one["findings"]) for name, one in networks.items()}


def measure_plain(work: Path) -> PlainCost:
    """Export a 5b transformer of reduced depth the plain way, and tell what all its blocks would need."""
    measured = {}
    for depth in PLAIN_DEPTHS:
        folder = work / f"plain-{depth}"
        folder.mkdir()
        measured[depth] = measure([sys.executable, "-c", PLAIN, str(depth), folder / "transformer.onnx"], folder)
        print(f"plain, {depth} blocks: {measured[depth]}", file=sys.stderr)
        shutil.rmtree(folder)
    first, last = (asdict(measured[depth]) for depth in PLAIN_DEPTHS)
    blocks, span = MODELS["5b"].num_layers, PLAIN_DEPTHS[-1] - PLAIN_DEPTHS[0]
    whole = {key: first[key] + (last[key] - first[key]) / span * (blocks - PLAIN_DEPTHS[0]) for key in first}
    return PlainCost({str(depth): one for depth, one in measured.items()}, Measured(**whole))


def table(results: dict[str, ModelCost], plain: PlainCost | None) -> list[str]:
    """Lay the results out as lines of Markdown."""
    lines = [
        "# Exports at the published sizes",
        "",
        "| model | checkpoint | seconds | peak memory | written | graphs |",
    ]
    lines.append("| --- | --- | --- | --- | --- | --- |")
    for name, result in results.items():
        seconds = result.seconds
        spread = f"{statistics.median(seconds):.0f}" + (
            f" ({min(seconds):.0f} to {max(seconds):.0f})" if len(seconds) > 1 else ""
        )
        lines.append(
            f"| {name} | {result.checkpoint_bytes / 1e9:.1f} GB | {spread} | {result.peak_bytes / 2**30:.2f} GiB "
            f"| {result.written_bytes / 1e6:.1f} MB | {len(result.networks)} |"
        )
    if plain is not None:
        lines += [
            "",
            "Plain `torch.onnx.export(dynamo=True, external_data=True)` of a 5b transformer in fp32, from memory:",
            "",
        ]
        lines += ["| blocks | seconds | peak memory | written |", "| --- | --- | --- | --- |"]
        rows = [*plain.measured.items(), ("42, extrapolated", plain.extrapolated)]
        for blocks, one in rows:
            lines.append(
                f"| {blocks} | {one.seconds:.0f} | {one.peak_bytes / 2**30:.1f} GiB "
                f"| {one.written_bytes / 1e9:.1f} GB |"
            )
    return lines


def main() -> None:
    """Read the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="a folder with 25 GB of room")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--runs", type=int, default=3, help="exports of each model")
    parser.add_argument("--note", default="nothing else ran", help="what else used the machine, for the report")
    parser.add_argument("--no-plain", action="store_true", help="leave torch.onnx.export out")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "export")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    checkpoints = "random weights, seed 0, with SHA256SUMS; shapes are each model's default"
    told = conditions(TOOLS, arguments.note, runs=arguments.runs, precision="fp32", checkpoints=checkpoints)
    plain = None if arguments.no_plain else measure_plain(arguments.work)
    results: dict[str, ModelCost] = {}
    for name in arguments.models:
        results[name] = measure_model(name, arguments.work, arguments.runs)
        content = {
            "models": {model: asdict(cost) for model, cost in results.items()},
            "plain": None if plain is None else asdict(plain),
        }
        # After each model, so that what is measured is kept.
        write(arguments.output, told, content, table(results, plain))


if __name__ == "__main__":
    main()
