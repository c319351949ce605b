"""Layer norms that `layer_norm` spelled out for TensorRT, as one operator again, when a graph is loaded.

Before, as `lean_layer_norms` left it, x and y in bfloat16 or float16::

    wide = cast32(x); mean = ReduceMean(wide); deviation = (ReduceMean((wide - mean) ** 2) + epsilon) ** 0.5
    again = Where(deviation >= 0, x, 0)
    y = cast((cast32(again) - mean) / deviation * weight + bias)

After, with the same values up to the order of sums::

    y = LayerNormalization(x, weight, bias)                       statistics in float32

ONNX Runtime has one kernel for the second on CUDA, and about a dozen for the first, each of which writes all of x in
float32. TensorRT's compiler wants the first; so bundles keep it, and this is done in memory.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cvx_deploy.graph.needed import keep_needed

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

_FLOAT = 1  # onnx.TensorProto.FLOAT
_HALVES = (10, 16)  # FLOAT16 and BFLOAT16


def restore_layer_norms(model: "ModelProto") -> int:
    """Put a LayerNormalization in the place of each spelled out, weights outside of the file; return how many."""
    from onnx import helper

    above = _Above({output: node for node in model.graph.node for output in node.output})
    norms = {node.output[0]: norm for node in model.graph.node if (norm := above.norm(node)) is not None}
    if not norms:
        return 0
    nodes = []
    for node in model.graph.node:
        norm = norms.get(node.output[0])
        if norm is None:
            nodes.append(node)
        else:
            nodes.append(
                helper.make_node(
                    "LayerNormalization", norm.inputs, node.output, node.name, axis=-1, epsilon=norm.epsilon
                )
            )
    keep_needed(model, nodes)
    return len(norms)


@dataclass(frozen=True)
class _Norm:
    """One that is spelled out: x, weight and bias by name, the last left out where there is none."""

    inputs: list[str]
    epsilon: float


@dataclass(frozen=True)
class _Above:
    """What stands above a value, by the node that makes it."""

    makers: "dict[str, NodeProto]"

    def norm(self, node: "NodeProto") -> _Norm | None:
        """Return the norm whose last node this is; None where it is the last of none."""
        if _cast_to(node) not in _HALVES:
            return None
        bias = self.operands(node.input[0], "Add")
        scaled = self.operands(bias[0] if bias else node.input[0], "Mul")
        if scaled is None:
            return None
        plain, weight = self.operands(scaled[0], "Mul"), self.widened(scaled[1])
        offset = [] if bias is None else [self.widened(bias[1])]
        centre = self.operands(plain[0], "Sub") if plain else None
        deviation = self.operands(plain[1], "Reciprocal") if plain else None
        x = self.widened(centre[0]) if centre else None
        if centre is None or deviation is None or x is None or weight is None or None in offset:
            return None
        again = self.operands(x, "Where")
        if again is None or not self._never_below_zero(again, deviation[0]):
            return None
        epsilon = self._epsilon(again[1], centre[1], deviation[0])
        return None if epsilon is None else _Norm([again[1], weight, *filter(None, offset)], epsilon)

    def _never_below_zero(self, again: list[str], deviation: str) -> bool:
        """Whether a Where takes x wherever a deviation is not below 0."""
        condition = self.operands(again[0], "GreaterOrEqual")
        zero = self.constant(condition[1]) if condition else None
        return condition is not None and condition[0] == deviation and zero is not None and not zero.any()

    def _epsilon(self, x: str, mean: str, deviation: str) -> float | None:
        """Return what is added to the variance; None where mean and deviation are not x's own, over its last axis."""
        root = self.operands(deviation, "Sqrt")
        total = self.operands(root[0], "Add") if root else None
        epsilon = self.constant(total[1]) if total else None
        squared = self._mean_of(total[0]) if total else None
        square = self.operands(squared, "Mul") if squared else None
        centred = self.operands(square[0], "Sub") if square and square[0] == square[1] else None
        wide = self._mean_of(mean)
        if epsilon is None or wide is None or centred != [wide, mean] or self.widened(wide) != x:
            return None
        return float(epsilon)

    def _mean_of(self, value: str) -> str | None:
        """Return what a value is the mean of, over the last axis."""
        inputs = self.operands(value, "ReduceMean")
        axes = self.constant(inputs[1]) if inputs and len(inputs) == 2 else None
        return inputs[0] if inputs and axes is not None and axes.tolist() == [-1] else None

    def operands(self, value: str, op_type: str) -> list[str] | None:
        """Return the inputs of the node that makes a value, if it is such an operator."""
        node = self.makers.get(value)
        return list(node.input) if node is not None and node.op_type == op_type else None

    def widened(self, value: str) -> str | None:
        """Return what a value is in float32."""
        node = self.makers.get(value)
        return node.input[0] if node is not None and _cast_to(node) == _FLOAT else None

    def constant(self, value: str) -> NDArray[Any] | None:
        """Return a constant of the graph itself; None for anything else."""
        from onnx import numpy_helper

        node = self.makers.get(value)
        if node is None or node.op_type != "Constant" or node.attribute[0].name != "value":
            return None
        return np.asarray(numpy_helper.to_array(node.attribute[0].t))


def _cast_to(node: "NodeProto") -> int | None:
    """Return the type that a Cast makes; None of another node."""
    if node.op_type != "Cast":
        return None
    return next((int(attribute.i) for attribute in node.attribute if attribute.name == "to"), None)
