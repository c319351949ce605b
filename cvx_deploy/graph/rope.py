"""Rotary positions on the whole sequence at once.

Before, diffusers' assignment to the video tokens alone::

    v = x[:, :, T:]; r = cast(cast32(v) * cos + cast32(stack(-v[1::2], v[::2])) * sin); y = ScatterND(x, T.., r)

After, with tables over all tokens (cos = 1 and sin = 0 over the T text tokens, whose values stay what they are)::

    y = cast(cast32(x) * cos' + cast32(swap(x)) * sin')        swap exchanges the channels of each pair

The sign of the rotation moves into the table of sines. The ScatterND, the slices and four transposes of each of Q and K
are gone, and what is left is elementwise.
"""

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from cvx_deploy.graph.patterns import above, constant, constant_node, made, producer


def rope_on_all_tokens(model: ir.Model) -> int:
    """Rewrite every rotation of a part of a sequence; return how many there were."""
    tables: dict[tuple[ir.Value, ir.Value, int], tuple[ir.Value, ir.Value]] = {}
    rewritten = 0
    for node in list(model.graph):
        found = _match(node) if node.op_type == "ScatterND" else None
        if found is not None:
            key = (found.cos, found.sin, found.start)
            if key not in tables:
                tables[key] = _whole_tables(model.graph, found)
            _rewrite(model.graph, found, *tables[key])
            rewritten += 1
    return rewritten


@dataclass(frozen=True)
class _Rotation:
    """A rotation of ``x (B, H, S, D)`` from token `start` on: its output, and its tables ``(S - start, D)``."""

    x: ir.Value
    output: ir.Value
    cos: ir.Value
    sin: ir.Value
    start: int
    rounded: bool
    name: str


def _match(scatter: ir.Node) -> _Rotation | None:
    """Return the rotation that a ScatterND ends, or None where it is not exactly that."""
    data, _, updates = scatter.inputs
    x, rotated = above(data, "Transpose"), above(updates, "Transpose")
    users = [usage.node for usage in scatter.outputs[0].uses()]
    if x is None or rotated is None or len(users) != 1 or users[0].op_type != "Transpose":
        return None
    cast = producer(rotated, "Cast")
    total = producer(cast.inputs[0] if cast else rotated, "Add")
    if total is None:
        return None
    straight, turned = (producer(value, "Mul") for value in total.inputs)
    if straight is None or turned is None:
        return None
    (video, cos), (pairs, sin) = ((_uncast(node.inputs[0]), _table(node.inputs[1])) for node in (straight, turned))
    start = _start(video, x)
    if cos is None or sin is None or start is None or _turned_from(pairs) is not video:
        return None
    return _Rotation(x, users[0].outputs[0], cos, sin, start, cast is not None, str(scatter.name))


def _uncast(value: ir.Value | None) -> ir.Value | None:
    cast = producer(value, "Cast")
    return cast.inputs[0] if cast is not None else value


def _table(value: ir.Value | None) -> ir.Value | None:
    return above(value, "Unsqueeze", "Unsqueeze")


def _start(video: ir.Value | None, x: ir.Value) -> int | None:
    """Return the token from which on `video` is `x`, if it is that."""
    cut = producer(video, "Slice")
    if cut is None or cut.inputs[0] is not x or x.shape is None:
        return None
    starts, ends, axes, steps = (constant(value) for value in cut.inputs[1:])
    if starts is None or ends is None or axes is None or steps is None:
        return None
    whole = [axes.tolist(), steps.tolist()] == [[2], [1]] and isinstance(x.shape[2], int) and int(ends[0]) >= x.shape[2]
    return int(starts[0]) if whole and int(starts[0]) > 0 else None


def _turned_from(value: ir.Value | None) -> ir.Value | None:
    """Return v of ``stack([-v[1::2], v[0::2]], -1)``, flattened."""
    stack = producer(above(value, "Reshape"), "Concat")
    if stack is None or len(stack.inputs) != 2 or stack.attributes.get_int("axis", 0) != -1:
        return None
    odd, even = above(stack.inputs[0], "Unsqueeze", "Neg", "Squeeze"), above(stack.inputs[1], "Unsqueeze", "Squeeze")
    pairs = [_half(half, place) for half, place in ((odd, 1), (even, 0))]
    return above(pairs[0], "Reshape") if pairs[0] is not None and pairs[0] is pairs[1] else None


def _half(value: ir.Value | None, place: int) -> ir.Value | None:
    """Return what `value` is the first or the second of each pair of, along the last axis."""
    cut = producer(value, "Slice")
    if cut is None:
        return None
    starts, ends, axes = (constant(each) for each in cut.inputs[1:4])
    if starts is None or ends is None or axes is None or axes.tolist() not in ([-1], [4]):
        return None
    return cut.inputs[0] if [starts.tolist(), ends.tolist()] == [[place], [place + 1]] else None


def _whole_tables(graph: ir.Graph, found: _Rotation) -> tuple[ir.Value, ir.Value]:
    """Return cosines and signed sines of all tokens, ``(S, D)``."""
    assert found.cos.shape is not None
    width = found.cos.shape[1]
    assert isinstance(width, int)
    signs = np.tile(np.array([-1, 1], np.float32), width // 2)
    nodes: list[ir.Node] = []

    def add(node: ir.Node) -> ir.Value:
        nodes.append(node)
        return node.outputs[0]

    size = add(constant_node(np.array([found.start, width]), f"{found.name}/text_rows"))
    signed = add(made("Mul", [found.sin, add(constant_node(signs, f"{found.name}/signs"))], found.sin, "sin/Signed"))
    whole = []
    for name, text, video in (("cos", 1, found.cos), ("sin", 0, signed)):
        value = add(constant_node(np.array(text, np.float32), f"{name}/text"))
        rows = add(made("Expand", [value, size], video, f"{name}/TextRows"))
        joined = add(made("Concat", [rows, video], video, f"{name}/Whole", {"axis": 0}))
        assert video.shape is not None
        rows.shape = ir.Shape((found.start, width))
        joined.shape = ir.Shape((found.start + int(video.shape[0]), width))  # type: ignore[arg-type]
        whole.append(joined)
    order = list(graph)
    makers = [maker for table in (found.cos, found.sin) if (maker := table.producer()) is not None]
    if makers:
        graph.insert_after(max(makers, key=order.index), nodes)
    else:
        graph.insert_before(order[0], nodes)
    return whole[0], whole[1]


def _rewrite(graph: ir.Graph, found: _Rotation, cos: ir.Value, sin: ir.Value) -> None:
    width = cos.shape[1] if cos.shape is not None else None
    assert isinstance(width, int)
    order = np.arange(width).reshape(-1, 2)[:, ::-1].reshape(-1)
    indices = constant_node(order, f"{found.name}/swap")
    swapped = made("Gather", [found.x, indices.outputs[0]], found.x, f"{found.name}/Swap", {"axis": -1})
    nodes = [indices, swapped]
    terms = []
    for value, table, part in ((found.x, cos, "Straight"), (swapped.outputs[0], sin, "Swapped")):
        if found.rounded:
            nodes.append(made("Cast", [value], value, f"{found.name}/{part}Wide", {"to": ir.DataType.FLOAT}))
            value = nodes[-1].outputs[0]
            value.type = ir.TensorType(ir.DataType.FLOAT)
        nodes.append(made("Mul", [value, table], value, f"{found.name}/{part}"))
        terms.append(nodes[-1].outputs[0])
    nodes.append(made("Add", terms, terms[0], f"{found.name}/Rotated"))
    if found.rounded:
        assert found.x.dtype is not None
        nodes.append(made("Cast", [nodes[-1].outputs[0]], found.x, f"{found.name}/Rounded", {"to": found.x.dtype}))
    end = found.output.producer()
    assert end is not None
    graph.insert_before(end, nodes)
    found.output.replace_all_uses_with(nodes[-1].outputs[0], replace_graph_outputs=True)
