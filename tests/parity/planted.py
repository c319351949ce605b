"""ONNX Runtime with a wrong kernel: a Gelu that follows an Add is computed as a Relu.

Run as a program, it is what checks a piece of a network, with that fault in it.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx

from cvx_deploy.engines.onnxruntime import backend, graphs


def wrong(load: Callable[..., bytes]) -> Callable[..., bytes]:
    """Return what loads graphs, and then plants the fault."""

    def planted(*arguments: Any) -> bytes:
        model = onnx.ModelProto.FromString(load(*arguments))
        sums = {node.output[0] for node in model.graph.node if node.op_type == "Add"}
        for node in model.graph.node:
            if node.op_type == "Gelu" and node.input[0] in sums:
                node.op_type = "Relu"
                del node.attribute[:]
        return bytes(model.SerializeToString())

    return planted


if __name__ == "__main__":
    from cvx_deploy.parity.reduction import SHOWS_IT, shows

    backend.graph_for_cpu = wrong(graphs.graph_for_cpu)  # type: ignore[attr-defined]
    raise SystemExit(SHOWS_IT if shows(Path(sys.argv[1])) else 0)
