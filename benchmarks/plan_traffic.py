"""Measure what the graph rewrites do for TensorRT, without a GPU: kernels and bytes moved in the compiled plan.

    python benchmarks/plan_traffic.py --work DIR [--model 5b ...] [--precision fp8] [--networks ...] [--each]

A checkpoint of the published width and two transformer blocks is made in `DIR` (3 GB) and kept. Its networks are
exported straight and with every rewrite, and compiled ahead of time by TensorRT for RTX at the published size; with
`--each` also with every rewrite but one, for what that one gains. What earlier runs measured with the same tools
stays in the results.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx
from report import conditions, write

from cvx_deploy.bundle.opened import Bundle
from cvx_deploy.engines.tensorrt.build import BuildRequest, build
from cvx_deploy.engines.tensorrt.compiled_plan import CompiledPlan
from cvx_deploy.engines.tensorrt.libraries import load_library
from cvx_deploy.engines.tensorrt.store import EngineStore
from cvx_deploy.errors import EngineError
from cvx_deploy.exporters.export import ExportRequest, bundle_from_checkpoint
from cvx_deploy.exporters.quantization.calibrate import CalibrationRequest, calibrate
from cvx_deploy.exporters.quantization.quantized import Quantizing
from cvx_deploy.exporters.sources.checkpoint import Checkpoint
from cvx_deploy.exporters.sources.synth import synthesize
from cvx_deploy.families.registry import MODELS
from cvx_deploy.graph.rewrites import REWRITES
from cvx_deploy.progress import SilentProgress
from cvx_deploy.shape import Shape

TOOLS = ("tensorrt-rtx-cu13", "torch", "diffusers", "onnx")
PRECISIONS = {"float16": "fp16", "bfloat16": "bf16"}
SMALL = Shape(9, 64, 64)
"""The video size that fp8's ranges are observed at: they are of random weights, so no more than their place matters."""


@dataclass(frozen=True)
class Traffic:
    """What one network compiled to.

    Attributes:
        nodes: Of the ONNX graph.
        kernels: Of the engine that move something; `block_kernels` those of one block, the mean over its blocks, 0
            without blocks.
        moved: Bytes that kernels of each kind read and write; `block_moved` in one block, as `block_kernels`.
        activation_bytes: Device memory for what lies between kernels.
        seconds: The build took.
    """

    nodes: int
    kernels: int
    block_kernels: float
    moved: dict[str, int]
    block_moved: dict[str, float]
    activation_bytes: int | None
    seconds: float


def checkpoint_of(model: str, work: Path) -> Path:
    """Return a checkpoint of the model's width, made in `work` unless it is there."""
    checkpoint = work / f"{model}-wide"
    return checkpoint if checkpoint.exists() else synthesize(model, "wide", checkpoint)


def exported(model: str, precision: str, rewrites: Collection[str] | None, work: Path) -> Bundle:
    """Export a model with some rewrites."""
    checkpoint = checkpoint_of(model, work)
    quantizing = Quantizing()
    if precision == "fp8":
        table = work / f"{model}-calibration.safetensors"
        if not table.exists():
            asked = CalibrationRequest(Checkpoint(checkpoint), SMALL, ("a red ball",), steps=2)
            calibrate(asked, table, SilentProgress())
        quantizing = Quantizing(table, any_shape=True)
    request = ExportRequest(model, checkpoint, precision=precision, quantizing=quantizing, rewrites=rewrites)
    return bundle_from_checkpoint(request, work / "variant")


def measure(bundle: Bundle, role: str, target: str) -> Traffic | str:
    """Compile one network and read the plan; what TensorRT says where it refuses."""
    request = BuildRequest(targets=(target,), networks=(role,), batch=(2, 2))
    try:
        (outcome,) = build(load_library("tensorrt-rtx"), bundle, request, SilentProgress())
    except EngineError as error:
        return f"refused: {error.what}"
    (plan,) = EngineStore(bundle).plans(outcome.record)
    nodes = len(onnx.load(bundle.onnx_path(role), load_external_data=False).graph.node)
    return traffic(plan, nodes, outcome.record.seconds)


def traffic(plan: CompiledPlan, nodes: int, seconds: float) -> Traffic:
    """Sum up a plan: all of it, and the mean of its blocks."""
    blocks = {block for block in plan.blocks if block is not None and "transformer_blocks" in block}
    working = [pair for pair in zip(plan.kernels, plan.blocks, strict=True) if pair[0].kind != "control"]
    inside = [kernel for kernel, block in working if block in blocks]
    count = max(len(blocks), 1)

    def moved(kernels: Collection[Any]) -> dict[str, int]:
        sums: dict[str, int] = {}
        for kernel in kernels:
            sums[kernel.kind] = sums.get(kernel.kind, 0) + (kernel.traffic or 0)
        return sums

    per_block = {kind: total / count for kind, total in moved(inside).items()}
    return Traffic(
        nodes, len(working), len(inside) / count, moved(plan.kernels), per_block, plan.activation_bytes, seconds
    )


def variants(each: bool) -> Iterator[tuple[str, Collection[str] | None]]:
    """Yield what to compile: its name and its rewrites."""
    yield "straight export", ()
    yield "all rewrites", None
    if each:
        for left_out in REWRITES:
            yield f"all but {left_out}", [name for name in REWRITES if name != left_out]


def lines(results: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Lay the results out as Markdown."""
    kinds = ("elementwise", "copy", "gemm", "attention")
    yield from ("# What the rewrites do to the compiled plan", "")
    heads = ["network", "variant", "nodes", "kernels", "kernels a block", *(f"{kind} GB a block" for kind in kinds)]
    heads += ["GB moved in all", "activations GB", "build s"]
    yield f"| {' | '.join(heads)} |"
    yield "| --- " * len(heads) + "|"
    for network, found in results.items():
        for variant, one in found.items():
            cells = [one] if isinstance(one, str) else _cells(one, kinds)
            yield f"| {' | '.join([network, variant, *cells, *[''] * (len(heads) - 2 - len(cells))])} |"
    yield from ("", "A block is one of the transformer's. Kernels that move nothing are not counted.")


def _cells(one: dict[str, Any], kinds: tuple[str, ...]) -> list[str]:
    block = [f"{one['block_moved'].get(kind, 0) / 1e9:.2f}" if one["block_kernels"] else "" for kind in kinds]
    per_block = f"{one['block_kernels']:.1f}" if one["block_kernels"] else ""
    active = "unknown" if one["activation_bytes"] is None else f"{one['activation_bytes'] / 1e9:.2f}"
    moved = f"{sum(one['moved'].values()) / 1e9:.2f}"
    return [str(one["nodes"]), str(one["kernels"]), per_block, *block, moved, active, f"{one['seconds']:.0f}"]


class Results:
    """What was measured, with what earlier runs found under the same conditions; written after every network."""

    def __init__(self, output: Path, target: str) -> None:
        self.output = output
        self.told = conditions(TOOLS, "compiled ahead of time without a GPU, not run", target=target, models={})
        self.networks: dict[str, dict[str, Any]] = {}
        file = output.with_suffix(".json")
        earlier = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        before = earlier.get("conditions", {})
        if all(before.get(key) == self.told[key] for key in ("versions", "target")):
            self.told["models"], self.networks = before["models"], earlier["networks"]

    def add(self, model: str, network: str, variant: str, found: Traffic | str) -> None:
        """Keep what one network compiled to."""
        entry = MODELS[model]
        size = f"{entry.frames}x{entry.height}x{entry.width}"
        self.told["models"][model] = f"{size}, {PRECISIONS[entry.dtype]}, batch 2, two blocks"
        plain = found if isinstance(found, str) else asdict(found)
        self.networks.setdefault(network, {})[variant] = plain
        print(f"{network}, {variant}: {found}", file=sys.stderr)
        write(self.output, self.told, {"networks": self.networks}, lines(self.networks))


def main() -> None:
    """Read the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="a folder with 5 GB of room")
    parser.add_argument("--model", nargs="+", choices=list(MODELS), default=["5b"])
    parser.add_argument("--precision", choices=["fp8"], help="default: the model's own type")
    parser.add_argument("--networks", nargs="+", default=["transformer"])
    parser.add_argument("--each", action="store_true", help="also leave out every rewrite in turn")
    parser.add_argument("--target", default="sm89", help="a compute capability")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "plan_traffic")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    results = Results(arguments.output, arguments.target)
    for model in arguments.model:
        precision = arguments.precision or PRECISIONS[MODELS[model].dtype]
        for name, rewrites in variants(arguments.each):
            bundle = exported(model, precision, rewrites, arguments.work)
            for role in filter(bundle.manifest.networks.__contains__, arguments.networks):
                network = f"{model} {role}" + (f", {precision}" if arguments.precision else "")
                results.add(model, network, name, measure(bundle, role, arguments.target))
            shutil.rmtree(bundle.path)


if __name__ == "__main__":
    main()
