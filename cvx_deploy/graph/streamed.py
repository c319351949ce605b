"""Weights that stay in their file, for ONNX Runtime on a CPU, when a graph is loaded.

Left to itself ONNX Runtime copies each weight, arranges the copy for its kernels, and keeps it in float32 or with a
scale for every 32 of its values: a 5b whose weights take 5.6 GB in 8 bits took 21 GB to load. Here a large weight
becomes an input of the graph, bound to the mapped file, and what is made of it is made anew in each run::

    y = MatMul(x, DequantizeLinear(w, scale))           w: int8 in the file
    y = MatMul(x, Cast(w))                              w: bfloat16 or float16 in the file

A copy in float32 then lives for one layer. The system can drop the file's pages and read them again. Three things keep
that cheap: a product of hundreds of tokens takes far longer than a weight's conversion; of an embedding only the rows
that are looked up are converted; and conversions stand first in the graph, which makes ONNX Runtime run each as late as
it can: of two nodes that wait for nothing it takes the one with the larger number first, from the outputs backwards.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto, TensorProto

LARGE_NETWORK = 256 << 20
"""Bytes of weights from which on it pays: below, they are soon copied, and few tokens make conversions count."""
_LARGE = 1 << 20  # bytes of one weight: the small ones are constants, which ONNX Runtime works into other nodes
_CONVERSIONS = {"DequantizeLinear", "Cast", "Transpose"}
_READERS = _CONVERSIONS | {"MatMul", "Gemm", "Gather"}


@dataclass(frozen=True)
class Streamed:
    """A weight that has become an input.

    Attributes:
        name: Of the input.
        kind: ONNX's number of its type.
        shape: Of the weight.
    """

    name: str
    kind: int
    shape: tuple[int, ...]


def stream_weights(model: "ModelProto") -> list[Streamed]:
    """Make inputs of a graph's large weights, and return what to bind to them.

    Args:
        model: A graph, weights outside of it.
    """
    graph = model.graph
    readers: dict[str, list[NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    found = {
        tensor.name: Streamed(tensor.name, tensor.data_type, tuple(tensor.dims))
        for tensor in graph.initializer
        if _is_large(tensor) and all(node.op_type in _READERS for node in readers.get(tensor.name, ()))
    }
    if found:
        for node in graph.node:
            if node.op_type == "Cast" and node.input[0] in found:
                _look_up_first(node, readers.get(node.output[0], []), {value.name for value in graph.input})
        _as_inputs(model, found)
        _convert_late(model, set(found))
    return list(found.values())


def _is_large(tensor: "TensorProto") -> bool:
    return any(entry.key == "length" and int(entry.value) >= _LARGE for entry in tensor.external_data)


def _look_up_first(cast: "NodeProto", after: "list[NodeProto]", given: set[str]) -> None:
    """Turn Gather(Cast(w), i) into Cast(Gather(w, i)), so that the rows that are asked for are converted alone."""
    if [node.op_type for node in after] != ["Gather"] or after[0].input[1] not in given:
        return
    gather, rows, wanted = after[0], f"{after[0].output[0]}/rows", after[0].output[0]
    gather.input[0], gather.output[0] = cast.input[0], rows
    cast.input[0], cast.output[0] = rows, wanted
    first, second = gather.SerializeToString(), cast.SerializeToString()
    cast.ParseFromString(first)
    gather.ParseFromString(second)


def _as_inputs(model: "ModelProto", found: dict[str, Streamed]) -> None:
    from onnx import helper

    kept = [tensor for tensor in model.graph.initializer if tensor.name not in found]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    model.graph.input.extend(
        helper.make_tensor_value_info(weight.name, weight.kind, weight.shape) for weight in found.values()
    )


def _convert_late(model: "ModelProto", weights: set[str]) -> None:
    """Put conversions of weights first in the graph."""
    known = weights | {tensor.name for tensor in model.graph.initializer}
    first: list[NodeProto] = []
    rest: list[NodeProto] = []
    for node in model.graph.node:
        of_weights = node.op_type in _CONVERSIONS and known.issuperset(filter(None, node.input))
        (first if of_weights else rest).append(node)
        if of_weights:
            known.update(node.output)
    del model.graph.node[:]
    model.graph.node.extend([*first, *rest])
