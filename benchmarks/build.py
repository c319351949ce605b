"""Measure builds at the published size with TensorRT for RTX, which needs no GPU: seconds, peak memory, engine size.

    python benchmarks/build.py --work DIR [--model 5b] [--target sm89] [--output benchmarks/results/build]

`DIR` needs about 60 GB: a checkpoint of random weights, its bundle, and the engines. The checkpoint is kept for another
run, the engines are removed. Each network is built once, in a process of its own.
"""

import argparse
import json
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from report import conditions, write

from cvx_deploy.bundle.opened import Bundle
from cvx_deploy.engines.tensorrt.memory import build_memory
from cvx_deploy.engines.tensorrt.plan_report import describe_plan
from cvx_deploy.engines.tensorrt.store import EngineStore
from cvx_deploy.families.registry import MODELS

TOOLS = ("tensorrt-rtx-cu13", "onnx", "torch", "diffusers")
PRECISIONS = {"float16": "fp16", "bfloat16": "bf16"}
PROGRAM = (sys.executable, "-m", "cvx_deploy")


@dataclass(frozen=True)
class Cost:
    """One engine's build.

    Attributes:
        seconds: From the parsed graph to the written engine.
        peak_bytes: Largest resident memory, mapped weights included; `private_bytes` without them.
        predicted_bytes: What the build's own estimate said before.
        attentions: Attention operators of the graph, and `fused` those that are one kernel.
        activation_bytes: Device memory for what lies between kernels; `weights_bytes` for the weights.
    """

    seconds: float
    peak_bytes: int
    private_bytes: int
    predicted_bytes: int
    engine_bytes: int
    attentions: int
    fused: int
    kernels: int
    activation_bytes: int | None
    weights_bytes: int | None


def measure(bundle: Path, network: str, target: str, batch: str) -> Cost:
    """Build one network's engine, and say what that took."""
    command = [*PROGRAM, "build", "--bundle", bundle, "--engine", "tensorrt-rtx", "--target", target]
    command += ["--network", network, "--batch", batch, "--force", "--json", "--quiet"]
    done = subprocess.run(list(map(str, command)), check=True, stdout=subprocess.PIPE, text=True)
    (engine,) = json.loads(done.stdout)["engines"]
    (finding,) = engine["findings"]
    opened = Bundle.open(bundle)
    store = EngineStore(opened)
    record = next(record for record in store.records() if record.file.path == engine["file"])
    (plan,) = store.plans(record)
    print(f"{network}: {engine['seconds']} s, {engine['peak_bytes'] / 2**30:.1f} GiB", file=sys.stderr)
    print(describe_plan(plan), file=sys.stderr)
    return Cost(
        seconds=engine["seconds"],
        peak_bytes=engine["peak_bytes"],
        private_bytes=engine["private_bytes"],
        predicted_bytes=build_memory(plan.weights_bytes or 0),
        engine_bytes=engine["bytes"],
        attentions=finding["attentions"],
        fused=finding["fused_attentions"],
        kernels=len(plan.kernels),
        activation_bytes=plan.activation_bytes,
        weights_bytes=plan.weights_bytes,
    )


def bundle_of(model: str, work: Path) -> Path:
    """Return a bundle of the model in its own type, made in `work` unless it is there."""
    checkpoint, bundle = work / model, work / f"{model}-{PRECISIONS[MODELS[model].dtype]}"
    made = [*PROGRAM, "synth", "--like", model, "--scale", "full", "--output", checkpoint, "--quiet"]
    exported = [*PROGRAM, "export", "--model", model, "--checkpoint", checkpoint, "--output", bundle, "--quiet"]
    exported += ["--precision", PRECISIONS[MODELS[model].dtype]]
    for place, command in ((checkpoint, made), (bundle, exported)):
        if not place.exists():
            subprocess.run(list(map(str, command)), check=True, stdout=sys.stderr)
    return bundle


def conditions_of(model: str, target: str, batch: str, note: str) -> dict[str, Any]:
    """Say what the figures were taken on."""
    return conditions(
        TOOLS,
        note,
        model=model,
        shape=f"{MODELS[model].frames}x{MODELS[model].height}x{MODELS[model].width}",
        precision=PRECISIONS[MODELS[model].dtype],
        batch=batch,
        target=target,
        gpu="none: compiled ahead of time, not run",
        runs=1,
    )


def table(costs: dict[str, Cost]) -> list[str]:
    """Lay the results out as lines of Markdown."""
    lines = ["# Builds at the published size, without a GPU", ""]
    heads = ("network", "seconds", "peak memory", "not mapped", "predicted", "engine", "fused attention", "kernels")
    lines.append(f"| {' | '.join((*heads, 'activations'))} |")
    lines.append("| --- " * (len(heads) + 1) + "|")
    for name, cost in costs.items():
        fused = f"{cost.fused} of {cost.attentions}" if cost.attentions else "has none"
        active = "unknown" if cost.activation_bytes is None else f"{cost.activation_bytes / 1e9:.2f} GB"
        sizes = (cost.peak_bytes, cost.private_bytes, cost.predicted_bytes)
        peak, private, predicted = (f"{size / 2**30:.1f} GiB" for size in sizes)
        lines.append(
            f"| {name} | {cost.seconds:.0f} | {peak} | {private} | {predicted} "
            f"| {cost.engine_bytes / 1e9:.2f} GB | {fused} | {cost.kernels} | {active} |"
        )
    return lines


def main() -> None:
    """Read the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="a folder with 60 GB of room")
    parser.add_argument("--model", choices=list(MODELS), default="5b")
    parser.add_argument("--target", default="sm89", help="a compute capability")
    parser.add_argument("--batch", default="2", help="of the transformer: 1, 2 or 1-2")
    parser.add_argument("--networks", nargs="+", help="default: all of the bundle's")
    parser.add_argument("--note", default="nothing else ran", help="what else used the machine, for the report")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "build")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    told = conditions_of(arguments.model, arguments.target, arguments.batch, arguments.note)
    bundle = bundle_of(arguments.model, arguments.work)
    costs: dict[str, Cost] = {}
    for network in arguments.networks or Bundle.open(bundle).manifest.networks:
        costs[network] = measure(bundle, network, arguments.target, arguments.batch)
        shutil.rmtree(bundle / "engines")
        # After each network, so that what is measured is kept.
        networks = {name: asdict(cost) for name, cost in costs.items()}
        write(arguments.output, told, {"networks": networks}, table(costs))


if __name__ == "__main__":
    main()
