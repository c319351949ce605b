"""See where ONNX Runtime puts a bundle's operators on CUDA, with which attention kernel, and what memory that takes.

    python benchmarks/cuda_placement.py BUNDLE [BUNDLE ...] [--runtime DIR] [--without-cudnn] [--run ROLE ...]

Every network is loaded in a process of its own, as `--engine onnxruntime-cuda` loads it, and those of `--run` run twice
on zeros. `--runtime` names a folder with ``site``, where an onnxruntime-gpu is installed, and ``lib``, where the CUDA
libraries are that it loads; without it, this environment's are used.

No GPU is needed where those libraries are stand-ins that count what is allocated and launch nothing. Then placement,
kernels and allocations are ONNX Runtime's own, and real; values and times are not, and none are kept. Stand-ins have no
cuDNN: with `--without-cudnn` each convolution is replaced by one that puts out its first value everywhere, and each
pooling by one that takes every other value, so that all is as large as it would be but for cuDNN's workspace.
"""

import argparse
import ctypes
import json
import os
import re
import subprocess
import sys
import unittest.mock
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper
from report import conditions, write

from cvx_deploy.bundle.opened import Bundle
from cvx_deploy.bundle.schema import dimension, numpy_dtype
from cvx_deploy.engines.onnxruntime.backend import OrtBackend

CUDA = "CUDAExecutionProvider"
TOOLS = ("numpy", "onnx")
_WHOLE = (TensorProto.INT64, TensorProto.INT32, TensorProto.BOOL)
_SYMBOL = re.compile(r"(?:\d+\*)?(?:batch|latent_height|latent_width)")
_KERNEL = re.compile(r"SdpaKernel=(\w+)")


@dataclass(frozen=True, kw_only=True)
class WithoutConvolutions(Bundle):
    """A bundle whose convolutions and poolings compute nothing, and put out what is as large."""

    sizes: dict[str, int]

    def onnx_bytes(self, role: str) -> bytes:
        """Return the ONNX file of a role's network, so changed."""
        model = inferred(super().onnx_bytes(role), self.sizes)
        shapes = {value.name: value.type.tensor_type.shape for value in (*model.graph.value_info, *model.graph.output)}
        nodes: list[onnx.NodeProto] = []
        for node in model.graph.node:
            if node.op_type == "AveragePool":
                nodes += _every_other(node)
            elif node.op_type == "Conv":
                nodes += _blank(node, [dim.dim_value for dim in shapes[node.output[0]].dim])
            else:
                nodes.append(node)
        del model.graph.node[:]
        model.graph.node.extend(nodes)
        return bytes(model.SerializeToString())


def inferred(graph: bytes, sizes: dict[str, int]) -> onnx.ModelProto:
    """Return a graph at these sizes, with the type and shape of every value that can be inferred."""
    model = onnx.ModelProto.FromString(graph)
    known = [value for value in model.graph.value_info if value.type.tensor_type.shape.dim]
    del model.graph.value_info[:]  # some say a type alone, or a size that nothing defines
    model.graph.value_info.extend(known)
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if _SYMBOL.fullmatch(dim.dim_param):
                dim.dim_value = dimension(dim.dim_param, sizes)
            elif dim.dim_param:
                dim.Clear()
    return onnx.shape_inference.infer_shapes(model, data_prop=True)


def _blank(node: onnx.NodeProto, shape: list[int]) -> Iterator[onnx.NodeProto]:
    """Yield what takes a convolution's place."""
    name, rank = node.output[0], len(shape)
    numbers = {"from": [0] * rank, "to": [1] * rank, "shape": shape}
    for what, values in numbers.items():
        yield helper.make_node("Constant", [], [f"{name}/{what}"], value_ints=values)
    yield helper.make_node("Slice", [node.input[0], f"{name}/from", f"{name}/to"], [f"{name}/first"])
    yield helper.make_node("Expand", [f"{name}/first", f"{name}/shape"], [name])


def _every_other(node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
    """Yield what takes the place of a pooling without padding."""
    told = {attribute.name: list(attribute.ints) for attribute in node.attribute}
    name, count = node.output[0], len(told["kernel_shape"])
    numbers = {
        "from": [0] * count,
        "to": [1 - size if size > 1 else 2**31 for size in told["kernel_shape"]],
        "axes": list(range(-count, 0)),
        "steps": told["strides"],
    }
    for what, values in numbers.items():
        yield helper.make_node("Constant", [], [f"{name}/{what}"], value_ints=values)
    yield helper.make_node("Slice", [node.input[0], *(f"{name}/{what}" for what in numbers)], [name])


def without_convolutions(bundle: Bundle, sizes: dict[str, int]) -> Bundle:
    """Return a bundle so changed, for networks at these sizes."""
    return WithoutConvolutions(path=bundle.path, manifest=bundle.manifest, index=bundle.index, sizes=sizes)


def sizes_of(bundle: Bundle, role: str) -> dict[str, int]:
    """Return the sizes of a network in a run with guidance and without tiles."""
    spatial = bundle.manifest.vae.spatial
    return {
        "batch": 2 if role == "transformer" else 1,
        "latent_height": bundle.shape.height // spatial,
        "latent_width": bundle.shape.width // spatial,
    }


def used() -> int:
    """Return the bytes of device memory that are in use, as the CUDA runtime tells; ONNX Runtime gives none back."""
    runtime = ctypes.CDLL("libcudart.so.13")
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    if runtime.cudaMemGetInfo(ctypes.byref(free), ctypes.byref(total)):
        raise RuntimeError("cudaMemGetInfo failed")
    return total.value - free.value


def placed(folder: Path, role: str, *, run: bool, without_cudnn: bool) -> dict[str, Any]:
    """Load a network in this process, and run it if asked to; return what was seen."""
    bundle = Bundle.open(folder)
    sizes = sizes_of(bundle, role)
    if without_cudnn:
        bundle = without_convolutions(bundle, sizes)
    backend, before = OrtBackend(bundle, device=0), used()
    with backend.load(role, sizes) as session:
        model = inferred(bundle.onnx_bytes(role), sizes)
        told = session._session.get_provider_graph_assignment_info()
        here = [node for part in told if part.ep_name != CUDA for node in part.get_nodes()]
        there = Counter(node.op_type for part in told if part.ep_name == CUDA for node in part.get_nodes())
        found: dict[str, Any] = {
            "onnxruntime": onnxruntime.__version__,
            "cuda": dict(there.most_common()),
            "cpu": dict(Counter(node.op_type for node in here).most_common()),
            "cpu_other_than_shapes": _other_than_shapes([(node.name, node.op_type) for node in here], model),
            "loaded_bytes": used() - before,
        }
        if run:
            specs = bundle.network(role).inputs
            inputs = {spec.name: np.zeros(spec.resolve(sizes), numpy_dtype(spec.dtype)) for spec in specs}
            peaks = []
            for _ in range(2):
                session.run(inputs)
                peaks.append(used() - before)
            found["after_runs_bytes"] = peaks
    return found


def _other_than_shapes(nodes: list[tuple[str, str]], model: onnx.ModelProto) -> list[str]:
    """Return which of these nodes, by name and operator, work on more than sizes.

    A GroupNormalization is a function of ONNX, which ONNX Runtime puts its own nodes in the place of: unnamed ones, and
    a Div and a Concat of each work the shape of the groups out.
    """
    whole = _whole_numbers(model)
    groups = sum(node.op_type == "GroupNormalization" for node in model.graph.node)
    unnamed = Counter(kind for name, kind in nodes if not name)
    expected = {"Div": groups, "Concat": groups}
    surplus = [f"unnamed {kind}" for kind, count in unnamed.items() if count > expected.get(kind, 0)]
    return sorted({name for name, _ in nodes if name and name not in whole} | set(surplus))


def _whole_numbers(model: onnx.ModelProto) -> set[str]:
    """Return the names of the nodes that put out whole numbers alone: sizes, and what is worked out from them."""
    types = {value.name: value.type.tensor_type.elem_type for value in (*model.graph.value_info, *model.graph.output)}
    return {node.name for node in model.graph.node if {types.get(name) for name in node.output} <= set(_WHOLE)}


def patch_loading() -> AbstractContextManager[Any]:
    """Let graphs be loaded as they were exported, for the block."""
    return unittest.mock.patch("cvx_deploy.engines.onnxruntime.backend.graph_for_cuda", lambda graph, _: graph)


def seen(folder: Path, role: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Do that in a process of its own, with the libraries that were named."""
    command = [sys.executable, __file__, str(folder), "--one", role]
    command += ["--without-cudnn"] if arguments.without_cudnn else []
    command += ["--run", role] if role in arguments.run else []
    command += ["--as-exported"] if arguments.as_exported else []
    environment = os.environ | {"ORT_ENABLE_ATTENTION_KERNEL_DEBUG_INFO": "1"}
    if arguments.runtime is not None:
        environment["PYTHONPATH"] = f"{arguments.runtime / 'site'}{os.pathsep}{Path(__file__).parent.parent}"
        environment["LD_LIBRARY_PATH"] = str(arguments.runtime / "lib")
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or ["it ended without a word"])[-1]}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found | {"attention": dict(Counter(_KERNEL.findall(done.stdout + done.stderr)))}


def table(results: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Lay the results out as lines of Markdown."""
    yield from ("# Where ONNX Runtime puts operators on CUDA", "")
    yield from ("| bundle | network | on CUDA | on the CPU | not of shapes | loaded | after a run | attention |",)
    yield "| --- " * 8 + "|"
    for bundle, networks in results.items():
        for role, one in networks.items():
            if "failed" in one:
                yield f"| {bundle} | {role} | fails: {one['failed']} | | | | | |"
                continue
            cpu = ", ".join(f"{count} {kind}" for kind, count in one["cpu"].items()) or "none"
            peak = f"{one['after_runs_bytes'][-1] / 1e9:.2f} GB" if "after_runs_bytes" in one else "not run"
            kernels = ", ".join(one["attention"]) or "-"
            cells = [bundle, role, sum(one["cuda"].values()), cpu, len(one["cpu_other_than_shapes"])]
            yield f"| {' | '.join(map(str, cells))} | {one['loaded_bytes'] / 1e9:.2f} GB | {peak} | {kernels} |"


def main() -> None:
    """Read the command line and look."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="+", type=Path, metavar="BUNDLE")
    parser.add_argument("--runtime", type=Path, help="a folder with site and lib; default: this environment's")
    parser.add_argument("--without-cudnn", action="store_true", help="let convolutions be blank, and poolings")
    parser.add_argument("--run", nargs="+", default=[], metavar="ROLE", help="networks to run as well")
    parser.add_argument("--as-exported", action="store_true", help="leave out what is rewritten when a graph is loaded")
    parser.add_argument("--note", default="", help="what the libraries were, for the report")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "cuda_placement")
    parser.add_argument("--one", metavar="ROLE", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        options = {"run": bool(arguments.run), "without_cudnn": arguments.without_cudnn}
        with patch_loading() if arguments.as_exported else nullcontext():
            print(json.dumps(placed(arguments.bundles[0], arguments.one, **options)))
        return
    results: dict[str, dict[str, Any]] = {}
    for folder in arguments.bundles:
        bundle = Bundle.open(folder)
        name = f"{bundle.path.name}, {bundle.manifest.precision}, {bundle.shape}"
        results[name] = {}
        for role in bundle.manifest.shapes[0].networks:
            results[name][role] = seen(folder, role, arguments)
            print(name, role, results[name][role].get("failed", "loads"), file=sys.stderr)
            version = results[name][role].get("onnxruntime", "unknown")
            told = conditions(
                TOOLS,
                arguments.note,
                without_cudnn=arguments.without_cudnn,
                as_exported=arguments.as_exported,
                onnxruntime_cuda=version,
            )
            write(arguments.output, told, {"bundles": results}, table(results))


if __name__ == "__main__":
    main()
