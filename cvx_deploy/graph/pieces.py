"""A network as one file that stands alone, as tools outside of this package take it, and pieces of such a file."""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator

from cvx_deploy.bundle.schema import Network, StoredFile, TensorSpec, dimension
from cvx_deploy.files import sha256_of

_TYPES: dict[int, Any] = {
    onnx.TensorProto.FLOAT: "float32",
    onnx.TensorProto.FLOAT16: "float16",
    onnx.TensorProto.INT64: "int64",
    onnx.TensorProto.BFLOAT16: "bfloat16",
}
_AXES = "ABCDEFGH"
_SYMBOL = re.compile(r"(?:\d+\*)?(?:batch|latent_height|latent_width)")


def standalone(
    model: onnx.ModelProto, weights: Mapping[str, NDArray[np.uint8]], sizes: Mapping[str, int]
) -> onnx.ModelProto:
    """Return a network at fixed sizes, with its weights inside and every shape that can be inferred.

    Args:
        model: Its graph; it is changed.
        weights: The bytes of every initializer that lies outside.
        sizes: Of its symbols.
    """
    for tensor in model.graph.initializer:
        if tensor.name in weights:
            del tensor.external_data[:]
            tensor.data_location = onnx.TensorProto.DEFAULT
            tensor.raw_data = weights[tensor.name].tobytes()
    _lower_constants(model.graph)
    del model.graph.value_info[:]
    for value in (*model.graph.input, *model.graph.output):
        for axis in value.type.tensor_type.shape.dim:
            if _SYMBOL.fullmatch(axis.dim_param):
                axis.dim_value = dimension(axis.dim_param, dict(sizes))
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
    _work_sizes_out(inferred)
    return inferred


def _lower_constants(graph: onnx.GraphProto) -> None:
    """Put an initializer in the place of each Constant, which a piece would else have to bring along."""
    kept = []
    for node in graph.node:
        if node.op_type == "Constant":
            [attribute] = node.attribute
            value = onnx.helper.get_attribute_value(attribute)
            if attribute.name != "value":
                value = onnx.numpy_helper.from_array(np.array(value, _CONSTANTS[attribute.name.rstrip("s")]))
            value.name = node.output[0]
            graph.initializer.append(value)
        else:
            kept.append(node)
    del graph.node[:]
    graph.node.extend(kept)


def _work_sizes_out(model: onnx.ModelProto) -> None:
    """Put numbers in the place of every node that works out sizes: a piece would else take them as inputs."""
    graph, opsets = model.graph, {entry.domain: entry.version for entry in model.opset_import}
    known = {value.name: value for value in (*graph.input, *graph.value_info)}
    whole = (tensor for tensor in graph.initializer if tensor.data_type in _WHOLE)
    values = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in whole}
    kept, worked_out = [], set[str]()
    for node in graph.node:
        found = _size_of(node, known) if node.op_type == "Shape" else _computed(node, values, opsets)
        if found is None or node.output[0] in {value.name for value in graph.output}:
            kept.append(node)
        else:
            values[node.output[0]] = found
            worked_out.add(node.output[0])
    del graph.node[:]
    graph.node.extend(kept)
    graph.initializer.extend(onnx.numpy_helper.from_array(values[name], name) for name in sorted(worked_out))


_WHOLE = (onnx.TensorProto.INT64, onnx.TensorProto.INT32, onnx.TensorProto.BOOL)


def _size_of(node: onnx.NodeProto, known: Mapping[str, onnx.ValueInfoProto]) -> NDArray[Any] | None:
    """Return what a Shape puts out, where that is known."""
    if node.input[0] not in known:
        return None
    axes = [axis.dim_value for axis in known[node.input[0]].type.tensor_type.shape.dim]
    ends = {attribute.name: attribute.i for attribute in node.attribute}
    return np.array(axes, np.int64)[ends.get("start", 0) : ends.get("end", len(axes))] if all(axes) else None


def _computed(node: onnx.NodeProto, values: Mapping[str, NDArray[Any]], opsets: dict[str, int]) -> NDArray[Any] | None:
    """Return what a node makes of whole numbers that are known, where it makes one tensor of whole numbers."""
    if node.domain or len(node.output) > 1 or not set(filter(None, node.input)) <= values.keys() or not node.input:
        return None
    given = {name: values[name] for name in node.input if name}
    [found] = ReferenceEvaluator(node, opsets=opsets).run(None, given)
    array = np.asarray(found)
    return array if array.dtype in (np.int64, np.int32, np.bool_) else None


_CONSTANTS: dict[str, Any] = {"value_int": np.int64, "value_float": np.float32}


def cut(model: onnx.ModelProto, start: int, end: int) -> onnx.ModelProto | None:
    """Return the piece of a graph from one of its nodes to another; None where the type of what it takes is not known.

    It takes what nodes before it put out, and puts out what nodes after it take.
    """
    graph, nodes = model.graph, model.graph.node[start:end]
    made = {name for node in nodes for name in node.output}
    weights = {tensor.name: tensor for tensor in graph.initializer}
    taken = dict.fromkeys(name for node in nodes for name in _taken(node) if name and name not in made)
    wanted = {value.name for value in graph.output} | {name for node in graph.node[end:] for name in _taken(node)}
    known = {value.name: value for value in (*graph.input, *graph.output, *graph.value_info)}
    inputs = [name for name in taken if name not in weights]
    outputs = [name for node in nodes for name in node.output if name in wanted]
    if not inputs or not outputs or not known.keys() >= {*inputs, *outputs}:
        return None
    other = onnx.ModelProto()
    other.CopyFrom(model)
    for field in ("node", "input", "output", "value_info", "initializer"):
        del getattr(other.graph, field)[:]
    other.graph.node.extend(nodes)
    other.graph.input.extend(known[name] for name in inputs)
    other.graph.output.extend(known[name] for name in outputs)
    other.graph.initializer.extend(weights[name] for name in taken if name in weights)
    return other


def _taken(node: onnx.NodeProto) -> list[str]:
    """Return what a node takes, and what the graphs within it take from outside."""
    inner = [name for attribute in node.attribute for deep in attribute.g.node for name in _taken(deep)]
    return [*node.input, *inner]


def piece(path: Path, network: Network) -> Network:
    """Return what a manifest would say of a piece of a network.

    Args:
        path: The piece's file, with its weights inside, in a bundle's folder.
        network: What the manifest says of the whole.

    Raises:
        ValueError: A tensor is of a type that a manifest does not know, or its size is not known.
    """
    graph = onnx.load(path).graph
    inputs, outputs = (tuple(map(_spec, values)) for values in (graph.input, graph.output))
    file = StoredFile(path.name, path.stat().st_size, sha256_of(path))
    return replace(network, file=file, inputs=inputs, outputs=outputs, weights=(), state={})


def _spec(value: onnx.ValueInfoProto) -> TensorSpec:
    told = value.type.tensor_type
    dtype = _TYPES.get(told.elem_type)
    if dtype is None:
        raise ValueError(f"{value.name} is of the ONNX type {told.elem_type}")
    shape = tuple(axis.dim_value for axis in told.shape.dim)
    return TensorSpec(value.name, dtype, shape, _AXES[: len(shape)])


def with_outputs(model: onnx.ModelProto, names: list[str]) -> onnx.ModelProto:
    """Return a graph that puts out these tensors instead of its own outputs."""
    other = onnx.ModelProto()
    other.CopyFrom(model)
    del other.graph.output[:]
    other.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    return other
