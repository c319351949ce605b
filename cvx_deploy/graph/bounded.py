"""Graphs that would take any amount of memory, or of time, told from their bytes before an engine sees them.

A few bytes of ONNX can ask for terabytes: a constant says how large a tensor is to be, or a loop how often it runs. The
exporter writes no loops, and no operator that is told a size but those it needs for small ones. Read is the protobuf
itself, not by the library for ONNX, which takes longer to import than this takes.

Source: https://github.com/onnx/onnx/blob/main/onnx/onnx.proto has the numbers of fields.
"""

import math
import struct
from collections.abc import Iterable, Iterator

from cvx_deploy.bundle.opened import Bundle
from cvx_deploy.errors import BundleError
from cvx_deploy.reading import reading
from cvx_deploy.shape import Shape

_REFUSED = frozenset(
    {"Loop", "If", "Scan", "SequenceMap"}
    | {"ConstantOfShape", "Tile", "OneHot", "EyeLike", "Upsample", "RandomNormal", "RandomUniform"}
)
_SIZED = frozenset({"Expand", "Pad", "Range", "Resize"})
"""Operators of this program that are told a size, or by how much to enlarge."""
_MULTIPLYING = frozenset({"Concat", "Mul"})
_PASSING = frozenset({"Add", "Cast", "Gather", "Identity", "Reshape", "Slice", "Squeeze", "Unsqueeze"})
"""Operators by which a size may come together, or go on."""
_FLOAT, _INT64, _EXTERNAL = 1, 7, 1
_FEW = 8
"""No tensor has more axes, so that no constant of more values is a shape."""
_VALUES_A_PIXEL = 1024
"""Of one tensor, for each pixel of a video: the widest of the VAE's have 42, the transformer's 26."""
_SMALL = 1 << 26
"""Values that any graph may hold: 256 MiB."""


def most_values(shape: Shape) -> int:
    """Return how many values a tensor of a network for videos of that shape may have."""
    return max(_SMALL, _VALUES_A_PIXEL * shape.frames * shape.height * shape.width)


def bounded_graph(bundle: Bundle, role: str) -> bytes:
    """Return the ONNX file of a role's network, and raise BundleError for one that would take any amount of memory."""
    content = bundle.onnx_bytes(role)
    with reading(bundle.onnx_path(role), BundleError, fix=bundle.remedy):
        check_bounded(content, max(map(most_values, bundle.shapes)))
    return content


def check_bounded(graph: bytes, most: int) -> None:
    """Raise ValueError for an ONNX file with a loop, or whose constants ask for a tensor of more than `most` values.

    Sizes are followed through the operators that exported graphs compute them by; what depends on an input counts as 1.
    """
    for number, value in _fields(memoryview(graph)):
        if number == 7:
            _Graph(most).check(_message(value))
        elif number == 25:
            raise ValueError("it has functions of its own, which no graph of this program has")


class _Graph:
    """The products of small constants, by name."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._products: dict[str, float] = {}

    def check(self, graph: memoryview) -> None:
        """Look at constants first, which come last."""
        parts = [(number, value) for number, value in _fields(graph) if number in (1, 5)]
        for number, value in parts:
            if number == 5:
                name, product = self._tensor(_message(value))
                self._products[name] = product
        for number, value in parts:
            if number == 1:
                self._node(_message(value))

    def _node(self, node: memoryview) -> None:
        fields = list(_fields(node))
        inputs, outputs, operators = ([_text(value) for key, value in fields if key == kind] for kind in (1, 2, 4))
        operator = operators[-1] if operators else ""
        if operator in _REFUSED:
            raise ValueError(f"it has the operator {operator}, which no graph of this program has")
        known = [self._products.get(name, 1.0) for name in inputs]
        product = 1.0
        if operator in _SIZED and max(known[1:], default=1.0) > self._most:
            raise ValueError(f"its {operator} makes a tensor of {max(known[1:]):.3g} values, or so many times as large")
        if operator in _MULTIPLYING:
            product = math.prod(known)
        elif operator in _PASSING:
            product = known[0] if known else 1.0
        for attribute in (_message(value) for key, value in fields if key == 5):
            for number, value in _fields(attribute):
                if number == 5:
                    product = self._tensor(_message(value))[1]
                elif number == 8 and operator == "Constant":
                    product *= _product(_varints(value))
        self._products.update(dict.fromkeys(outputs, product))

    def _tensor(self, tensor: memoryview) -> tuple[str, float]:
        """Return the name of a constant, and the product of its values where they may be sizes or scales."""
        dims, values = list[int](), list[float]()
        name, kind, raw, outside = "", 0, b"", False
        for number, value in _fields(tensor):
            if number == 1:
                dims += _varints(value)
            elif number == 2:
                kind = _varints(value)[-1]
            elif number == 7:
                values += _varints(value)
            elif number == 8:
                name = _text(value)
            elif number == 9:
                raw = bytes(_message(value)[: 8 * _FEW + 1])
            elif number == 14:
                outside = value == _EXTERNAL
        if not outside and math.prod(dims) > self._most:
            raise ValueError(f"its constant {name} has the shape {dims}")
        code, width = ("q", 8) if kind == _INT64 else ("f", 4)
        if kind in (_INT64, _FLOAT) and len(raw) <= width * _FEW and len(raw) % width == 0:
            values += struct.unpack(f"<{len(raw) // width}{code}", raw)
        return name, _product(values) if kind in (_INT64, _FLOAT) and len(values) <= _FEW else 1.0


def _product(values: Iterable[float]) -> float:
    """Return the product of those that make something larger."""
    return math.prod(float(value) for value in values if value > 1)


def _text(value: int | memoryview) -> str:
    return bytes(_message(value)).decode()


def _message(value: int | memoryview) -> memoryview:
    if isinstance(value, int):
        raise ValueError("it is no ONNX")
    return value


def _varints(value: int | memoryview) -> list[int]:
    """Return one number, or those that a packed field holds, as signed numbers of 64 bits."""
    found = [value] if isinstance(value, int) else []
    place = 0
    while not isinstance(value, int) and place < len(value):
        number, place = _varint(value, place)
        found.append(number)
    return [number - (1 << 64) if number >> 63 else number for number in found]


def _varint(data: memoryview, place: int) -> tuple[int, int]:
    number = shift = 0
    while True:
        if place >= len(data) or shift > 63:
            raise ValueError("it is cut, or no protobuf")
        byte = data[place]
        number |= (byte & 127) << shift
        place, shift = place + 1, shift + 7
        if byte < 128:
            return number, place


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Yield the number and the value of every field of a message: bytes, or an integer; fixed ones are left out."""
    place = 0
    while place < len(data):
        tag, place = _varint(data, place)
        if tag & 7 == 0:
            value, place = _varint(data, place)
            yield tag >> 3, value
        elif tag & 7 in (1, 5):
            place += 8 if tag & 7 == 1 else 4
        elif tag & 7 == 2:
            size, place = _varint(data, place)
            if place + size > len(data):
                raise ValueError("it is cut, or no protobuf")
            yield tag >> 3, data[place : place + size]
            place += size
        else:
            raise ValueError("it is no protobuf")
