"""How many floating-point operations a graph takes, and what share of a card's measured rate a run of it achieves."""

import json
import math
from pathlib import Path
from typing import Any

import onnx


def flops(model: onnx.ModelProto) -> int:
    """Return the operations of a graph's products, convolutions and attentions; every size in it is known."""
    values = (*model.graph.input, *model.graph.output, *model.graph.value_info)
    shapes = {value.name: [axis.dim_value for axis in value.type.tensor_type.shape.dim] for value in values}
    shapes |= {tensor.name: list(tensor.dims) for tensor in model.graph.initializer}
    return sum(_of(node, shapes) for node in model.graph.node)


def _of(node: onnx.NodeProto, shapes: dict[str, list[int]]) -> int:
    if node.op_type not in ("MatMul", "Gemm", "Conv", "Attention"):
        return 0
    first, second, out = shapes[node.input[0]], shapes[node.input[1]], shapes[node.output[0]]
    if node.op_type == "Conv":
        return 2 * math.prod(out) * math.prod(second[1:])
    if node.op_type == "Attention":  # (batch, heads, tokens, size): scores, and what they weigh
        return 4 * math.prod(first) * second[-2]
    return 2 * math.prod(out) * first[-1]


def rate(operations: int, seconds: float, output: Path) -> dict[str, Any]:
    """Return the rate in TFLOP/s, and its share of what the part ``facts`` has measured, where that has."""
    found: dict[str, Any] = {"tflops": round(operations / seconds / 1e12, 3)}
    facts = output / "facts.json"
    measured = json.loads(facts.read_text(encoding="utf-8")).get("bf16_tflops") if facts.exists() else None
    return found | ({"of_measured": round(found["tflops"] / measured, 3)} if measured else {})
