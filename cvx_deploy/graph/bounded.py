"""Graphs that would take any amount of memory, or of time, told before an engine sees them.

A few bytes of ONNX can ask for terabytes: a constant says how large a tensor is to be, or a loop how often it runs. The
exporter writes no loops, and no operator that is told a size but those it needs for small ones.
"""

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from cvx_deploy.bundle.opened import Bundle
from cvx_deploy.errors import BundleError
from cvx_deploy.reading import reading
from cvx_deploy.shape import Shape

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto, TensorProto

_REFUSED = frozenset(
    {"Loop", "If", "Scan", "SequenceMap"}
    | {"ConstantOfShape", "Tile", "OneHot", "EyeLike", "Upsample", "RandomNormal", "RandomUniform"}
)
_SIZED = frozenset({"Expand", "Pad", "Range", "Resize"})
"""Operators of this program that are told a size, or by how much to enlarge."""
_MULTIPLYING = frozenset({"Concat", "Mul"})
_PASSING = frozenset({"Add", "Cast", "Gather", "Identity", "Reshape", "Slice", "Squeeze", "Unsqueeze"})
"""Operators by which a size may come together, or go on."""
_NUMBERS = {1: "<f4", 7: "<i8"}  # onnx.TensorProto.FLOAT and INT64
_EXTERNAL = 1  # onnx.TensorProto.EXTERNAL
_FEW = 8
"""No tensor has more axes, so that no constant of more values is a shape."""
_VALUES_A_PIXEL = 1024
"""Of one tensor, for each pixel of a video: the widest of the VAE's have 42, the transformer's 26."""
_SMALL = 1 << 26
"""Values that any graph may hold: 256 MiB."""


def most_values(shape: Shape) -> int:
    """Return how many values a tensor of a network for videos of that shape may have."""
    return max(_SMALL, _VALUES_A_PIXEL * shape.frames * shape.height * shape.width)


def bounded_graph(bundle: Bundle, role: str) -> tuple[bytes, "ModelProto"]:
    """Return the ONNX file of a role's network, and what it says.

    Raises:
        BundleError: It would take any amount of memory, or of time.
    """
    content = bundle.onnx_bytes(role)
    with reading(bundle.onnx_path(role), BundleError, fix=bundle.remedy):
        return content, check_bounded(content, max(map(most_values, bundle.shapes)))


def check_bounded(graph: bytes, most: int) -> "ModelProto":
    """Return what an ONNX file says.

    Raises ValueError for one with a loop, or whose constants ask for a tensor of more than `most` values.

    Sizes are followed through the operators that exported graphs compute them by; what depends on an input counts as 1.
    """
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model: ModelProto = onnx.ModelProto.FromString(graph)
    except DecodeError as error:
        raise ValueError("it is cut, or no ONNX") from error
    if model.functions:
        raise ValueError("it has functions of its own, which no graph of this program has")
    _Products(most).check(model.graph)
    return model


class _Products:
    """The products of small constants, by name."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._known: dict[str, float] = {}

    def check(self, graph: "GraphProto") -> None:
        """Look at constants first, then at the operators that take them."""
        for tensor in graph.initializer:
            self._known[tensor.name] = self._tensor(tensor)
        for node in graph.node:
            self._node(node)

    def _node(self, node: "NodeProto") -> None:
        if node.op_type in _REFUSED:
            raise ValueError(f"it has the operator {node.op_type}, which no graph of this program has")
        known = [self._known.get(name, 1.0) for name in node.input]
        product = 1.0
        if node.op_type in _SIZED and max(known[1:], default=1.0) > self._most:
            told = max(known[1:])
            raise ValueError(f"its {node.op_type} makes a tensor of {told:.3g} values, or so many times as large")
        if node.op_type in _MULTIPLYING:
            product = math.prod(known)
        elif node.op_type in _PASSING:
            product = known[0] if known else 1.0
        for attribute in node.attribute:
            if attribute.HasField("t"):
                product = self._tensor(attribute.t)
            elif node.op_type == "Constant":
                product *= _product(attribute.ints)
        self._known.update(dict.fromkeys(node.output, product))

    def _tensor(self, tensor: "TensorProto") -> float:
        """Return the product of a constant's values, where they may be sizes or scales."""
        if tensor.data_location != _EXTERNAL and math.prod(tensor.dims) > self._most:
            raise ValueError(f"its constant {tensor.name} has the shape {list(tensor.dims)}")
        values: list[Any] = [*tensor.int64_data[: _FEW + 1], *tensor.float_data[: _FEW + 1]]
        if (kind := _NUMBERS.get(tensor.data_type)) is not None and len(tensor.raw_data) <= 8 * _FEW:
            values += np.frombuffer(tensor.raw_data, kind).tolist()
        return _product(values) if kind is not None and len(values) <= _FEW else 1.0


def _product(values: Iterable[float]) -> float:
    """Return the product of those that make something larger."""
    return math.prod(float(value) for value in values if value > 1)
