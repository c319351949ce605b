"""Measure what the graph rewrites do for TensorRT, without a GPU: kernels and bytes moved in the compiled plan.

    python benchmarks/plan_traffic.py --work DIR [--model 5b] [--networks transformer] [--each]

A checkpoint of the published width and two transformer blocks is made in `DIR` (3 GB) and kept. Its networks are
compiled ahead of time by TensorRT for RTX at the published size, from the straight export and with every rewrite; with
`--each` also with every rewrite but one, for what that one gains.
"""

import argparse
import shutil
import subprocess
import sys
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
from report import conditions, write

from cvx_deploy.build.build import BuildRequest, build
from cvx_deploy.build.libraries import load_library
from cvx_deploy.build.plan import CompiledPlan
from cvx_deploy.build.store import EngineStore
from cvx_deploy.bundle import MANIFEST, Bundle, StoredFile
from cvx_deploy.errors import EngineError
from cvx_deploy.exporters.checkpoint import Checkpoint
from cvx_deploy.exporters.export import contracts_for
from cvx_deploy.exporters.trace import onnx_from_contract
from cvx_deploy.files import sha256_of
from cvx_deploy.graph.rewrites import REWRITES
from cvx_deploy.models import MODELS
from cvx_deploy.progress import SilentProgress
from cvx_deploy.quantize.recipe import Recipe

TOOLS = ("tensorrt-rtx-cu13", "torch", "diffusers", "onnx")
PRECISIONS = {"float16": "fp16", "bfloat16": "bf16"}
PROGRAM = (sys.executable, "-m", "cvx_deploy")


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


def bundle_of(model: str, work: Path) -> Bundle:
    """Return a bundle of the model's width in its own type, made in `work` unless it is there."""
    checkpoint, bundle = work / f"{model}-wide", work / f"{model}-bundle"
    precision = PRECISIONS[MODELS[model].dtype]
    made = [*PROGRAM, "synth", "--like", model, "--scale", "wide", "--output", checkpoint, "--quiet"]
    exported = [*PROGRAM, "export", "--model", model, "--checkpoint", checkpoint, "--output", bundle, "--quiet"]
    for place, command in ((checkpoint, made), (bundle, [*exported, "--precision", precision])):
        if not place.exists():
            subprocess.run(list(map(str, command)), check=True, stdout=sys.stderr)
    return Bundle.open(bundle)


def rewritten(bundle: Bundle, role: str, rewrites: Collection[str] | None, folder: Path) -> tuple[Bundle, int]:
    """Write a copy of the bundle with one network exported again; return it and the nodes of that network's graph."""
    manifest = bundle.manifest
    checkpoint = Checkpoint(Path(manifest.checkpoint))
    contracts = contracts_for(checkpoint, bundle.shape, Recipe.parse(manifest.precision, "bf16"))
    contract = next(contract for contract in contracts if contract.name == role)
    where = checkpoint.place(contract.component)
    model = onnx_from_contract(contract, checkpoint.tensors(contract.component), where, rewrites)
    shutil.copytree(bundle.path, folder)
    described = manifest.networks[role]
    path = folder / described.file.path
    ir.save(model, path)
    network = replace(described, file=StoredFile(path.name, path.stat().st_size, sha256_of(path)))
    changed = replace(manifest, networks=manifest.networks | {role: network})
    (folder / MANIFEST).write_bytes(changed.to_json())
    return Bundle.open(folder), len(list(model.graph))


def measure(bundle: Bundle, role: str, rewrites: Collection[str] | None, target: str, work: Path) -> Traffic:
    """Compile one network with some rewrites, and read the plan."""
    folder = work / "variant"
    shutil.rmtree(folder, ignore_errors=True)
    variant, nodes = rewritten(bundle, role, rewrites, folder)
    request = BuildRequest(targets=(target,), networks=(role,), batch=(2, 2))
    (outcome,) = build(load_library("tensorrt-rtx"), variant, request, SilentProgress())
    (plan,) = EngineStore(variant).plans(outcome.record)
    shutil.rmtree(folder)
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


def lines(results: dict[str, dict[str, Traffic | str]]) -> Iterator[str]:
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


def _cells(one: Traffic, kinds: tuple[str, ...]) -> list[str]:
    block = [f"{one.block_moved.get(kind, 0) / 1e9:.2f}" if one.block_kernels else "" for kind in kinds]
    per_block = f"{one.block_kernels:.1f}" if one.block_kernels else ""
    active = "unknown" if one.activation_bytes is None else f"{one.activation_bytes / 1e9:.2f}"
    moved = f"{sum(one.moved.values()) / 1e9:.2f}"
    return [str(one.nodes), str(one.kernels), per_block, *block, moved, active, f"{one.seconds:.0f}"]


def main() -> None:
    """Read the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="a folder with 5 GB of room")
    parser.add_argument("--model", nargs="+", choices=list(MODELS), default=["5b"])
    parser.add_argument("--networks", nargs="+", default=["transformer"])
    parser.add_argument("--each", action="store_true", help="also leave out every rewrite in turn")
    parser.add_argument("--target", default="sm89", help="a compute capability")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "plan_traffic")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    shapes = {
        name: f"{entry.frames}x{entry.height}x{entry.width}, {PRECISIONS[entry.dtype]}, batch 2, two blocks"
        for name, entry in MODELS.items()
        if name in arguments.model
    }
    told = conditions(TOOLS, "compiled ahead of time without a GPU, not run", target=arguments.target, models=shapes)
    results: dict[str, dict[str, Traffic | str]] = {}
    for model in arguments.model:
        bundle = bundle_of(model, arguments.work)
        for role in filter(bundle.manifest.networks.__contains__, arguments.networks):
            found = results.setdefault(f"{model} {role}", {})
            for name, rewrites in variants(arguments.each):
                try:
                    found[name] = measure(bundle, role, rewrites, arguments.target, arguments.work)
                except EngineError as error:
                    found[name] = f"refused: {error.what}"
                print(f"{model} {role}, {name}: {found[name]}", file=sys.stderr)
                # After each, so that what is measured is kept.
                plain = {
                    network: {key: one if isinstance(one, str) else asdict(one) for key, one in its.items()}
                    for network, its in results.items()
                }
                write(arguments.output, told, {"networks": plain}, lines(results))


if __name__ == "__main__":
    main()
