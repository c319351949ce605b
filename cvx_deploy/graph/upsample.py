"""1x1x1 convolutions before the upsampling of what they read, and upsampling as a broadcast.

Before::

    y = Conv(Resize(z, nearest), 1x1x1)

After::

    y = Reshape(Expand(Unsqueeze(Conv(z, 1x1x1))))

A convolution of single cells does not see its neighbours, so it gives equal results for equal cells: the VAE decoder's
spatial norms convolve a latent once rather than 256 times. The same holds where the frames of a first chunk are taken
apart, upsampled differently, and joined again. As a broadcast, the upsampling costs nothing in a compiler
that fuses it into what reads it.
"""

import re

import numpy as np
import onnx_ir as ir

_KIND = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}

Dim = int | ir.SymbolicDim


def convolve_before_upsampling(model: ir.Model) -> int:
    """Move every 1x1x1 convolution before the nearest upsampling that feeds it; return how many were moved."""
    constants: dict[tuple[int, ...], ir.Value] = {}
    return sum(_rewrite(model.graph, node, constants) for node in list(model.graph) if _is_pointwise(node))


def _rewrite(graph: ir.Graph, conv: ir.Node, constants: dict[tuple[int, ...], ir.Value]) -> bool:
    resizes = _resizes(conv.inputs[0])
    factors = [_factors(resize) for resize in resizes]
    repeats = [factor for factor in factors if factor is not None]
    if not resizes or len(repeats) < len(factors):
        return False
    maker = _Maker(graph, conv, constants)
    pieces = [maker.piece(resize, repeat) for resize, repeat in zip(resizes, repeats, strict=True)]
    joint = conv.inputs[0].producer() if conv.inputs[0] is not None else None
    joined = maker.node("Concat", *pieces, **joint.attributes) if joint and len(pieces) > 1 else pieces[0]
    joined.shape = conv.outputs[0].shape
    conv.outputs[0].replace_all_uses_with(joined, replace_graph_outputs=True)
    graph.remove(conv, safe=True)
    return True


def _is_pointwise(node: ir.Node) -> bool:
    """Whether a node is a convolution that reads one cell for each it writes."""
    if node.op_type != "Conv" or node.attributes.get_string("auto_pad", "NOTSET") != "NOTSET":
        return False
    ones = (*node.attributes.get_ints("kernel_shape", [0]), *node.attributes.get_ints("strides", []))
    return set(ones) == {1} and not any(node.attributes.get_ints("pads", []))


def _resizes(value: ir.Value | None) -> list[ir.Node]:
    """Return the Resize that a value comes from, or those of the pieces it is joined of; none if it is neither."""
    producer = value.producer() if value is not None else None
    if producer is not None and producer.op_type == "Concat" and producer.attributes.get_int("axis", 1) > 1:
        producers = [piece.producer() for piece in producer.inputs if piece is not None]
    else:
        producers = [producer]
    found = [node for node in producers if node is not None and node.op_type == "Resize"]
    return found if len(found) == len(producers) else []


def _factors(resize: ir.Node) -> list[int] | None:
    """Return how often a Resize repeats each cell along the axes behind the channels, or None if it does not."""
    source, sizes = resize.inputs[0], resize.inputs[3] if len(resize.inputs) > 3 else None
    result = resize.outputs[0]
    kind = [resize.attributes.get_string(name, "") for name in _KIND]
    if kind != [*_KIND.values()] or source is None or sizes is None or source.shape is None or result.shape is None:
        return None
    ratios = [_ratio(before, after) for before, after in zip(source.shape, result.shape, strict=True)]
    known = [ratio for ratio in ratios if ratio is not None]
    return known[2:] if len(known) == len(ratios) and known[:2] == [1, 1] else None


def _ratio(before: Dim, after: Dim) -> int | None:
    """Return how many times a size goes into another of the same symbol."""
    (count, symbol), (larger, other) = _parsed(before), _parsed(after)
    return larger // count if symbol == other and larger % count == 0 else None


def _parsed(size: Dim) -> tuple[int, str | None]:
    """Write a size such as ``8*latent_height`` as its factor and its symbol."""
    if isinstance(size, int):
        return size, ""
    found = re.fullmatch(r"(?:(\d+)\*)?(.+)", size.value or "")
    return (int(found[1] or 1), found[2]) if found else (1, None)


class _Maker:
    """Makes the nodes that take a convolution's place, under its name."""

    def __init__(self, graph: ir.Graph, conv: ir.Node, constants: dict[tuple[int, ...], ir.Value]) -> None:
        self.graph = graph
        self.conv = conv
        self.made = 0
        self._constants = constants
        self._convolved: dict[ir.Value, ir.Value] = {}

    def piece(self, resize: ir.Node, repeats: list[int]) -> ir.Value:
        """Return what the convolution makes of one Resize."""
        source = resize.inputs[0]
        assert source is not None
        cut = source.producer()
        if cut is not None and _cuts_no_channels(cut):
            value = self.node("Slice", self._convolve(cut.inputs[0]), *cut.inputs[1:])
        else:
            value = self._convolve(source)
        return value if set(repeats) == {1} else self._repeated(value, resize.inputs[3], repeats)

    def _convolve(self, source: ir.Value | None) -> ir.Value:
        assert source is not None
        if source not in self._convolved:
            self._convolved[source] = self.node("Conv", source, *self.conv.inputs[1:], **self.conv.attributes)
        return self._convolved[source]

    def _repeated(self, value: ir.Value, sizes: ir.Value | None, repeats: list[int]) -> ir.Value:
        """Repeat every cell; innermost axis first, while what is repeated is small, for engines that store each."""
        axes = [2 * index + 3 for index in range(len(repeats))]
        value = self.node("Unsqueeze", value, self._constant(*axes))
        for axis, repeat in reversed(list(zip(axes, repeats, strict=True))):
            if repeat > 1:
                shape = [repeat if place == axis else 1 for place in range(2 * len(repeats) + 2)]
                value = self.node("Expand", value, self._constant(*shape))
        plane = self.node("Slice", sizes, self._constant(2), self._constant(len(repeats) + 2))
        whole = self.node("Concat", self._constant(0, 0), plane, axis=0)
        plane.type = whole.type = ir.TensorType(ir.DataType.INT64)
        return self.node("Reshape", value, whole)

    def _constant(self, *numbers: int) -> ir.Value:
        """Return a constant of the graph, the same one for equal numbers."""
        if numbers not in self._constants:
            name = f"{self.conv.name}/Constant_{len(self._constants)}"
            tensor = ir.tensor(np.array(numbers, np.int64))
            made = ir.node("Constant", [], attributes={"value": tensor}, name=name)
            made.outputs[0].type = ir.TensorType(ir.DataType.INT64)
            self.graph.insert_before(self.conv, made)
            self._constants[numbers] = made.outputs[0]
        return self._constants[numbers]

    def node(self, op_type: str, *inputs: ir.Value | None, **attributes: ir.Attr | int) -> ir.Value:
        """Return the output of a new node, of the type that the convolution has."""
        self.made += 1
        name = f"{self.conv.name}/{op_type}_{self.made}"
        made = ir.node(op_type, list(inputs), attributes=attributes, name=name)
        self.graph.insert_before(self.conv, made)
        made.outputs[0].type = self.conv.outputs[0].type
        return made.outputs[0]


def _cuts_no_channels(node: ir.Node) -> bool:
    """Whether a node is a Slice along axes behind the channels."""
    axes = node.inputs[3] if node.op_type == "Slice" and len(node.inputs) > 3 else None
    known = ir.convenience.get_const_tensor(axes) if axes is not None else None
    return known is not None and bool((known.numpy() > 1).all())
