"""What the VAE does to single frames, or to single pixels over time, done to the chunk as it lies.

Before, where a chunk ``(1, C, F, H, W)`` is turned to ``(F, C, H, W)`` and back::

    y = Transpose(Reshape(Conv(Resize(Reshape(Transpose(x))), 3x3)))

After, and the same for an AveragePool over the frames, which turns it to ``(H * W, C, F)``::

    y = Conv(Resize(x), 1x3x3)

A kernel of one frame sees no other, so only the order in which numbers lie differs, and TensorRT writes the whole chunk
once more for each turn. Networks of float32, which are for CPUs, keep their kernels of fewer dimensions. A first frame
that is not pooled with the others stays turned, and they with it: to take the chunk apart in place costs more.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir

from cvx_deploy.graph.patterns import constant, constant_node, made, producer

_HALVES = (ir.DataType.BFLOAT16, ir.DataType.FLOAT16)
_FRAMES = (0, 2, 1, 3, 4)
_PIXELS = (0, 3, 4, 1, 2)


def frames_in_place(model: ir.Model) -> int:
    """Rewrite everything that a chunk is turned for and turned back; return how many places there were."""
    transposes = [node for node in model.graph if node.op_type == "Transpose"]
    return sum(_rewrite(model.graph, node) for node in transposes)


def _rewrite(graph: ir.Graph, back: ir.Node) -> bool:
    reshape, y = producer(back.inputs[0], "Reshape"), back.outputs[0]
    perm = tuple(back.attributes.get_ints("perm", ()))
    if reshape is None or perm not in (_FRAMES, _PIXELS) or y.dtype not in _HALVES:
        return False  # both turns are their own inverse
    if not _is_turned(y, reshape.inputs[0], perm):
        return False
    lift = _Lift(perm)
    lifted = lift.value(reshape.inputs[0])
    if lifted is None or not lift.nodes:
        return False
    lifted.shape = y.shape
    graph.insert_before(back, lift.nodes)
    y.replace_all_uses_with(lifted, replace_graph_outputs=True)
    return True


def _is_turned(chunk: ir.Value | None, turned: ir.Value | None, perm: tuple[int, ...]) -> bool:
    """Whether a value has the sizes of a chunk of one video that is turned like this, its first axes in one."""
    if chunk is None or turned is None or chunk.shape is None or turned.shape is None or len(chunk.shape) != 5:
        return False
    sizes = [chunk.shape[axis] for axis in perm]
    kept = sizes[1:] if perm == _FRAMES else sizes[3:]
    found = list(turned.shape) if perm == _FRAMES else list(turned.shape)[1:]
    return sizes[0] == 1 and found == kept


class _Lift:
    """Does to a chunk what a graph does to the turned one; nothing is in the graph before all of it is known."""

    def __init__(self, perm: tuple[int, ...]) -> None:
        self.perm = perm
        self.nodes: list[ir.Node] = []
        ways: dict[str, Callable[[ir.Node], ir.Node | None]] = {"Conv": self._conv, "Resize": self._resize}
        self._ways = ways if perm == _FRAMES else {"AveragePool": self._pool}

    def value(self, turned: ir.Value | None) -> ir.Value | None:
        """Return what stands for a turned value in the chunk's own layout, or None where that is not known."""
        node = turned.producer() if turned is not None else None
        if turned is None or node is None:
            return None
        if node.op_type == "Reshape":
            turn = producer(node.inputs[0], "Transpose")
            if turn is None or tuple(turn.attributes.get_ints("perm", ())) != self.perm:
                return None
            return turn.inputs[0] if _is_turned(turn.inputs[0], turned, self.perm) else None
        made_of = self._ways[node.op_type](node) if node.op_type in self._ways else None
        if made_of is None:
            return None
        self.nodes.append(made_of)
        result = made_of.outputs[0]
        sizes = turned.shape
        four = sizes is not None and self.perm == _FRAMES and len(sizes) == 4
        result.shape = ir.Shape([1, sizes[1], sizes[0], sizes[2], sizes[3]]) if four and sizes is not None else None
        return result

    def _conv(self, node: ir.Node) -> ir.Node | None:
        x, weight, attributes = self.value(node.inputs[0]), node.inputs[1], _spread(node, before=1, after=0)
        if x is None or weight is None or weight.shape is None or attributes is None:
            return None
        axis = constant_node(np.array([2]), f"{node.name}/Frame/axis")
        wide = made("Unsqueeze", [weight, axis.outputs[0]], weight, f"{node.name}/Frame/Unsqueeze")
        wide.outputs[0].shape = ir.Shape([*weight.shape[:2], 1, *weight.shape[2:]])
        self.nodes += [axis, wide]
        return _like(node, [x, wide.outputs[0], *node.inputs[2:]], attributes)

    def _resize(self, node: ir.Node) -> ir.Node | None:
        scales = constant(node.inputs[2]) if len(node.inputs) == 3 else None
        x = self.value(node.inputs[0])
        nearest = node.attributes.get_string("mode", "nearest") == "nearest"
        if x is None or scales is None or scales.tolist()[:2] != [1, 1] or not nearest:
            return None
        wide = constant_node(np.array([1, *scales.tolist()], np.float32), f"{node.name}/Frame/scales")
        self.nodes.append(wide)
        return _like(node, [x, None, wide.outputs[0]], dict(node.attributes))

    def _pool(self, node: ir.Node) -> ir.Node | None:
        x, attributes = self.value(node.inputs[0]), _spread(node, before=0, after=2)
        return None if x is None or attributes is None else _like(node, [x], attributes)


def _like(node: ir.Node, inputs: list[ir.Value | None], attributes: dict[str, Any]) -> ir.Node:
    return made(node.op_type, inputs, node.outputs[0], f"{node.name}/Frame", attributes)


def _spread(node: ir.Node, before: int, after: int) -> dict[str, Any] | None:
    """Return a kernel's attributes with more axes of one cell; None where padding is not in numbers."""
    if node.attributes.get_string("auto_pad", "NOTSET") != "NOTSET":
        return None
    attributes: dict[str, Any] = dict(node.attributes)
    for name in ("kernel_shape", "strides", "dilations"):
        if name in attributes:
            attributes[name] = [*[1] * before, *node.attributes.get_ints(name, []), *[1] * after]
    pads = list(node.attributes.get_ints("pads", []))
    if pads:
        half = len(pads) // 2
        attributes["pads"] = [p for part in (pads[:half], pads[half:]) for p in (*[0] * before, *part, *[0] * after)]
    return attributes
