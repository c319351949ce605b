"""ONNX's Attention as ONNX Runtime's own operator for CPUs, when a graph is loaded.

Before::

    y = Attention(q, k, v)                                        (B, heads, S, head size) each

After, with the same values up to the order of sums::

    q, k, v = Reshape(Transpose(.), (B, S, heads * head size))
    y = Transpose(Reshape(com.microsoft.MultiHeadAttention(q, k, v), (B, S, heads, head size)))

ONNX Runtime's kernel for the first holds the scores of all pairs of tokens: 12 GB for 48 heads of 8,026 tokens, and
61 GB for a 5b at 49x480x720. That for the second goes through them in tiles (FlashAttention, arXiv:2205.14135). The
operator is none of ONNX's, and other engines do not know it; so bundles keep the first, and this is done in memory.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from cvx_deploy.bundle.schema import Network
from cvx_deploy.graph.contrib import DOMAIN, allow_contrib

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

TILED_CELLS = 1024
"""Cells of the latents from which on it pays: below, scores are small, and reading the graph is what takes time."""
_PLAIN = {"is_causal": 0, "softcap": 0.0, "qk_matmul_output_mode": 0, "softmax_precision": 1}
"""What an Attention may say besides its scale and its heads: what is so without a word."""


def is_transformer(network: Network) -> bool:
    """Whether a network takes the latents that are denoised."""
    return any(spec.name == "hidden_states" for spec in network.inputs)


def holds_large_scores(network: Network, sizes: dict[str, int]) -> bool:
    """Whether a network is a transformer of so many tokens that its attention is to go through them in tiles."""
    for spec in network.inputs:
        if spec.name == "hidden_states":
            _, frames, _, height, width = spec.resolve(sizes)
            return frames * height * width >= TILED_CELLS
    return False


def attend_in_tiles(model: "ModelProto") -> int:
    """Give each float32 Attention of three inputs the other form, and return how many there were."""
    import onnx

    shapes = {value.name: value.type.tensor_type for value in (*model.graph.value_info, *model.graph.input)}
    nodes: list[NodeProto] = []
    tiled = 0
    for node in model.graph.node:
        tensor = shapes.get(node.input[0]) if _fits(node) else None
        heads = tensor.shape.dim[1].dim_value if tensor is not None and len(tensor.shape.dim) == 4 else 0
        floats = tensor is not None and tensor.elem_type == onnx.TensorProto.FLOAT
        nodes.extend(_tiled(node, heads) if heads and floats else [node])
        tiled += bool(heads and floats)
    if tiled:
        del model.graph.node[:]
        model.graph.node.extend(nodes)
        allow_contrib(model)
    return tiled


def _fits(node: "NodeProto") -> bool:
    """Whether a node is an attention of all tokens to all, without a mask."""
    if (
        node.op_type != "Attention"
        or node.domain not in ("", "ai.onnx")
        or [len(node.input), len(node.output)] != [3, 1]
    ):
        return False
    said = {given.name: given.f if given.name == "softcap" else given.i for given in node.attribute}
    return all(said[name] == value for name, value in _PLAIN.items() if name in said)


def _tiled(node: "NodeProto", heads: int) -> Iterator["NodeProto"]:
    """Yield the nodes that take an Attention's place."""
    from onnx import helper

    def shape(name: str, *sizes: int) -> "NodeProto":
        return helper.make_node("Constant", [], [f"{node.name}/{name}"], value_ints=sizes)

    yield from (shape("joined", 0, 0, -1), shape("split", 0, 0, heads, -1))
    inputs = [f"{node.name}/{name}" for name in ("query", "key", "value")]
    for source, name in zip(node.input, inputs, strict=True):
        yield helper.make_node("Transpose", [source], [f"{name}/rows"], f"{name}/Transpose", perm=[0, 2, 1, 3])
        yield helper.make_node("Reshape", [f"{name}/rows", f"{node.name}/joined"], [name], f"{name}/Reshape")
    scale = {given.name: given.f for given in node.attribute if given.name == "scale"}
    joined, rows = f"{node.name}/output", f"{node.name}/output/rows"
    tiles = helper.make_node("MultiHeadAttention", inputs, [joined], node.name, domain=DOMAIN, num_heads=heads, **scale)
    yield tiles
    yield helper.make_node("Reshape", [joined, f"{node.name}/split"], [rows], f"{joined}/Reshape")
    yield helper.make_node("Transpose", [rows], node.output, f"{joined}/Transpose", perm=[0, 2, 1, 3])
