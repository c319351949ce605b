"""Measure what rewriting a transformer at full depth takes: nodes before and after, places, seconds, memory.

    python benchmarks/rewriting.py [--model 5b]

Needs no checkpoint: the graph is traced from the published config, and rewrites read no weights.
"""

import argparse
import resource
import time
from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes import common as passes
from report import conditions, write

from cvx_deploy.exporters.cogvideox.transformer import TransformerContract
from cvx_deploy.exporters.sources.synth_configs import transformer_config
from cvx_deploy.exporters.tracing.graph import graph_from_contract
from cvx_deploy.families.registry import MODELS
from cvx_deploy.graph.rewrites import rewrite
from cvx_deploy.precision import Precision
from cvx_deploy.shape import Shape

TOOLS = ("torch", "diffusers", "onnx-ir", "onnxscript")


def peak_bytes() -> int:
    """Return this process's largest resident memory so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def nodes_of(model: ir.Model) -> int:
    """Count what is not dead, constants with it."""
    passes.RemoveUnusedNodesPass()(model)
    return len(list(model.graph))


def main() -> None:
    """Read the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(MODELS), default="5b")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "rewriting")
    arguments = parser.parse_args()
    model = MODELS[arguments.model]
    precision: Precision = "fp16" if model.dtype == "float16" else "bf16"
    shape = Shape(model.frames, model.height, model.width)
    contract = TransformerContract(transformer_config(model, "full"), precision, shape, spatial=8, temporal=4)
    told = conditions(TOOLS, "one process", model=model.name, precision=precision, shape=str(shape))
    start = time.perf_counter()
    graph = graph_from_contract(contract, Path(model.name))
    traced = time.perf_counter() - start
    before, traced_peak = nodes_of(graph), peak_bytes()
    start = time.perf_counter()
    places = rewrite(graph)
    seconds = time.perf_counter() - start
    after, peak = nodes_of(graph), peak_bytes()
    found = {
        "nodes": {"trace": before, "rewrites": after},
        "places": places,
        "seconds": {"trace": round(traced, 1), "rewrites": round(seconds, 2)},
        "peak_bytes": {"trace": traced_peak, "rewrites": peak},
    }
    lines = [
        f"# Rewriting the {model.name}'s transformer of {model.num_layers} blocks",
        "",
        "| | nodes | seconds | peak memory |",
        "| --- | --- | --- | --- |",
        f"| trace | {before} | {traced:.1f} | {traced_peak / 2**30:.2f} GiB |",
        f"| rewrites | {after} | {seconds:.2f} | {peak / 2**30:.2f} GiB |",
        "",
        "Places rewritten: " + ", ".join(f"{count} {name}" for name, count in places.items()) + ".",
    ]
    write(arguments.output, told, found, lines)


if __name__ == "__main__":
    main()
