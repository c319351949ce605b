"""Text and video tokens worked on as the one sequence they are.

Before, as diffusers writes every norm with its modulation and every residual of a block::

    t, v = Split(x); y = Concat(t * rows of text, v * rows of video)

After, with a mask over the tokens, to the bit::

    y = x * Where(is_text, rows of text, rows of video)

Every token has its own channels to itself in a sum, a product and a layer norm over the last axis, so the two parts
need not be apart for them. Split and joined again, they cost TensorRT a kernel for the few text tokens and one that
joins both, which it fuses with neither norm. As one sequence, a gated residual, the norm after it and its modulation
are one kernel. Networks of float32, which are for CPUs, are left alone: there it gains nothing.
"""

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from cvx_deploy.graph.patterns import constant, constant_node, made

_HALVES = (ir.DataType.BFLOAT16, ir.DataType.FLOAT16)
_TOKENWISE = ("Add", "Mul", "LayerNormalization")


def join_text_and_video(model: ir.Model) -> int:
    """Rewrite every joint of two parts of one sequence that were worked on alike; return how many there were."""
    joiner = _Joiner(model.graph)
    concats = [node for node in model.graph if node.op_type == "Concat" and len(node.inputs) == 2]
    joined = sum(joiner.rewrite(node) for node in concats)
    if joined:
        RemoveUnusedNodesPass()(model)
        model.graph.sort()
    return joined


Pair = tuple[ir.Value, ir.Value]
"""Text and video part of one sequence, ``(B, T, D)`` and ``(B, V, D)``."""


class _Joiner:
    """Makes joint values of a graph's pairs; each pair then becomes the two pieces of its joint value."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self._masks: dict[tuple[int, int], ir.Value] = {}

    def rewrite(self, concat: ir.Node) -> bool:
        text, video = concat.inputs
        if text is None or video is None or text.dtype not in _HALVES or concat.attributes.get_int("axis", 0) != 1:
            return False
        if not _can_join((text, video)):
            return False
        concat.outputs[0].replace_all_uses_with(self._joined((text, video)), replace_graph_outputs=True)
        return True

    def _joined(self, pair: Pair) -> ir.Value:
        whole = _whole(pair)
        return self._worked_on(pair) if whole is None else whole

    def _worked_on(self, pair: Pair) -> ir.Value:
        """Return the joint value of two that the same operator makes, and let their users take its pieces."""
        video = pair[1].producer()
        assert video is not None
        assert pair[1].shape is not None
        inputs: list[ir.Value | None] = []
        for text_input, video_input in _inputs(pair):
            if text_input is video_input:
                inputs.append(video_input)
            elif _lengths((text_input, video_input)) is not None:
                inputs.append(self._joined((text_input, video_input)))
            else:
                inputs.append(self._rows(text_input, video_input, pair))
        node = made(video.op_type, inputs, pair[1], f"{video.name}/Joint", dict(video.attributes))
        joint = node.outputs[0]
        joint.shape = ir.Shape([pair[1].shape[0], sum(_lengths(pair) or ()), *pair[1].shape[2:]])
        self.graph.insert_before(video, node)
        self._hand_out(joint, pair)
        return joint

    def _rows(self, text: ir.Value, video: ir.Value, pair: Pair) -> ir.Value:
        """Return a row for each token: that of its part."""
        node = pair[1].producer()
        lengths = _lengths(pair)
        assert node is not None
        assert lengths is not None
        assert video.shape is not None
        rows = made("Where", [self._is_text(lengths), text, video], video, f"{node.name}/Rows")
        rows.outputs[0].shape = ir.Shape([video.shape[0], sum(lengths), video.shape[2]])
        self.graph.insert_before(node, rows)
        return rows.outputs[0]

    def _is_text(self, lengths: tuple[int, int]) -> ir.Value:
        if lengths not in self._masks:
            mask = np.arange(sum(lengths))[None, :, None] < lengths[0]
            node = constant_node(mask, f"is_text_{len(self._masks)}")
            node.outputs[0].shape, node.outputs[0].type = ir.Shape(mask.shape), ir.TensorType(ir.DataType.BOOL)
            self.graph.insert_before(self.graph[0], node)
            self._masks[lengths] = node.outputs[0]
        return self._masks[lengths]

    def _hand_out(self, joint: ir.Value, pair: Pair) -> None:
        """Make a pair the two pieces of its joint value, for whoever works on one of them alone."""
        lengths, node = _lengths(pair), pair[1].producer()
        assert lengths is not None
        assert node is not None
        for part, start, length in zip(pair, (0, lengths[0]), lengths, strict=True):
            numbers = [constant_node(np.array([number]), "") for number in (start, start + length, 1)]
            for place, number in enumerate(numbers):
                number.name = f"{node.name}/Joint/piece_{start}/{place}"
            piece = made("Slice", [joint, *(n.outputs[0] for n in numbers)], part, f"{node.name}/Joint/Slice_{start}")
            part.replace_all_uses_with(piece.outputs[0], replace_graph_outputs=True)
            self.graph.insert_before(node, [*numbers, piece])


def _inputs(pair: Pair) -> Iterator[Pair]:
    makers = [value.producer() for value in pair]
    assert makers[0] is not None
    assert makers[1] is not None
    for text, video in zip(makers[0].inputs, makers[1].inputs, strict=True):
        if text is not None and video is not None:
            yield text, video


def _lengths(pair: Pair) -> tuple[int, int] | None:
    """Return how many tokens each part has; None where they are no parts of a sequence."""
    shapes = [value.shape for value in pair]
    sizes = [shape[1] for shape in shapes if shape is not None and len(shape) == 3]
    if len(sizes) != 2 or not all(isinstance(size, int) and size > 1 for size in sizes):
        return None
    return int(sizes[0]), int(sizes[1])  # type: ignore[arg-type]


def _whole(pair: Pair) -> ir.Value | None:
    """Return the tensor that a pair are the two pieces of, or None."""
    text, video = (value.producer() for value in pair)
    lengths = _lengths(pair)
    if text is None or video is None or lengths is None or text.inputs[0] is not video.inputs[0]:
        return None
    source = text.inputs[0]
    if source is None or source.shape is None or len(source.shape) != 3 or source.shape[1] != sum(lengths):
        return None
    if text is video:
        split = text.op_type == "Split" and text.attributes.get_int("axis", 0) == 1
        return source if split and tuple(text.outputs) == pair else None
    pieces = _cut(text) == (0, lengths[0]) and _cut(video) in ((lengths[0], sum(lengths)), (lengths[0], None))
    return source if pieces else None


def _cut(node: ir.Node) -> tuple[int, int | None] | None:
    """Return where a Slice along the tokens starts and ends, None for its end where that is behind them all."""
    numbers = [constant(value) for value in node.inputs[1:]]
    if node.op_type != "Slice" or len(numbers) < 3 or any(number is None or number.size != 1 for number in numbers):
        return None
    start, end, axis, *step = (int(number.item()) for number in numbers if number is not None)
    shape = node.inputs[0].shape if node.inputs[0] is not None else None
    if axis != 1 or step not in ([], [1]) or start < 0 or end < 0 or shape is None or not isinstance(shape[1], int):
        return None
    return start, (end if end <= shape[1] else None)


def _can_join(pair: Pair) -> bool:
    """Whether two values are made alike, token by token, of pieces of the same tensors."""
    if _whole(pair) is not None:
        return True
    text, video = (value.producer() for value in pair)
    lengths = _lengths(pair)
    if text is None or video is None or lengths is None or text is video or text.op_type != video.op_type:
        return False
    alike = text.attributes == video.attributes and len(text.inputs) == len(video.inputs)
    if text.op_type not in _TOKENWISE or not alike:
        return False
    parts = [inputs for inputs in _inputs(pair) if _lengths(inputs) is not None and inputs[0] is not inputs[1]]
    if text.op_type == "LayerNormalization":
        same = text.inputs[1:] == video.inputs[1:] and text.attributes.get_int("axis", -1) in (-1, 2)
        return same and len(text.outputs) == 1 and len(parts) == 1 and _can_join(parts[0])
    rows = [inputs for inputs in _inputs(pair) if inputs not in parts]
    return bool(parts) and all(map(_can_join, parts)) and all(_are_rows(inputs, lengths) for inputs in rows)


def _are_rows(pair: Pair, lengths: tuple[int, int]) -> bool:
    """Whether two values are one row each, the same for all tokens of a part, and made of no tokens."""
    for value in pair:
        if value.shape is None or len(value.shape) != 3 or value.shape[1] != 1 or _has_tokens(value, lengths):
            return False
    return True


def _has_tokens(value: ir.Value, lengths: tuple[int, int]) -> bool:
    """Whether a value is computed from tokens: then to join what it is for could need its own result."""
    todo, seen = [value], {value}
    while todo:
        maker = todo.pop().producer()
        for read in maker.inputs if maker is not None else ():
            if read is None or read in seen:
                continue
            if read.shape is not None and len(read.shape) == 3 and read.shape[1] in (*lengths, sum(lengths)):
                return True
            seen.add(read)
            todo.append(read)
    return False
