"""What is wrong with an ONNX graph, found without reading a weight.

Weights lie wherever the manifest says, under names that may not exist beside the graph, so neither the checker nor
shape inference could read them. Both need their types and shapes only: initializers with outside data become graph
inputs of the same type and shape, and constants inside the graph stay, so that sizes computed from them are inferred.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx
from onnx import TensorProto

from cvx_deploy.bundle.schema import Network, TensorSpec
from cvx_deploy.errors import BundleError
from cvx_deploy.graph.bounded import check_bounded
from cvx_deploy.reading import read_whole, reading
from cvx_deploy.terminal import no_foreign_lines, reason

_STORED: dict[str, tuple[str, float]] = {
    **{"DOUBLE": ("F64", 8), "FLOAT": ("F32", 4), "FLOAT16": ("F16", 2), "BFLOAT16": ("BF16", 2)},
    **{"FLOAT8E4M3FN": ("F8_E4M3", 1), "FLOAT8E5M2": ("F8_E5M2", 1), "BOOL": ("BOOL", 1)},
    **{"INT64": ("I64", 8), "INT32": ("I32", 4), "INT16": ("I16", 2), "INT8": ("I8", 1)},
    **{"UINT64": ("U64", 8), "UINT32": ("U32", 4), "UINT16": ("U16", 2), "UINT8": ("U8", 1)},
    "INT4": ("U8", 0.5),
}
"""ONNX type to the safetensors name of the same, and its bytes; two INT4 lie in one byte, which has no other name."""

_BOUNDARY = {"FLOAT": "float32", "FLOAT16": "float16", "BFLOAT16": "bfloat16", "INT64": "int64"}
_LARGEST = (1 << 31) - 1  # bytes that a protobuf may have
_LONGEST = 400  # characters of what onnx says of one graph

_MOST_AXES = 8

Placed = tuple[str, tuple[int, ...]]
"""The safetensors type and the shape of a tensor."""


@dataclass(frozen=True)
class WeightPlaces:
    """What may be found in a weight file.

    Attributes:
        size: Its bytes.
        tensors: What its header knows, by offset from the start of the file and length; None for a file without one.
    """

    size: int
    tensors: Mapping[tuple[int, int], list[Placed]] | None


@dataclass(frozen=True)
class GraphCheck:
    """What a graph is, and what is wrong with it.

    Attributes:
        opset: Version of the standard operators; 0 when it names none.
        nodes: How many nodes it has.
        weights: How many of its tensors lie in weight files.
        findings: One line each; none when it is sound.
    """

    opset: int
    nodes: int
    weights: int
    findings: tuple[str, ...]


def check_graph(path: Path, network: Network, files: Mapping[str, WeightPlaces], most: int) -> GraphCheck:
    """Check an ONNX file: opset, weights, interface, ``onnx.checker`` and strict shape inference.

    Args:
        path: The file.
        network: What the manifest says of it.
        files: The weight files that its manifest knows.
        most: How many values a tensor may have.
    """
    try:
        with reading(path.name, BundleError, fix=""), no_foreign_lines():
            content = read_whole(path, BundleError, fix="", limit=_LARGEST)
            return _checked(check_bounded(content, most), network, files)
    except BundleError as error:
        return GraphCheck(0, 0, 0, (error.what,))


def _checked(model: onnx.ModelProto, network: Network, files: Mapping[str, WeightPlaces]) -> GraphCheck:
    opset = next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 0)
    outside = [tensor for tensor in model.graph.initializer if _is_outside(tensor)]
    findings = [
        *_opset_findings(model, opset),
        *_weight_findings(outside, network, files),
        *_interface_findings("input", list(model.graph.input), network.inputs),
        *_interface_findings("output", list(model.graph.output), network.outputs),
    ]
    _become_inputs(model.graph, outside)
    findings += _structure_findings(model)
    return GraphCheck(opset, len(model.graph.node), len(outside), tuple(findings))


def _is_outside(tensor: TensorProto) -> bool:
    return tensor.data_location == TensorProto.EXTERNAL


def _opset_findings(model: onnx.ModelProto, opset: int) -> Iterator[str]:
    newest = onnx.defs.onnx_opset_version()
    if not 1 <= opset <= newest:
        yield f"opset {opset} is not one that onnx {onnx.__version__} knows (1 to {newest})"
    known = {schema.domain for schema in onnx.defs.get_all_schemas()} | {"ai.onnx"}
    for domain in sorted({entry.domain for entry in model.opset_import} - known):
        yield f"it uses operators of {domain}, which onnx does not know"


def _weight_findings(outside: list[TensorProto], network: Network, files: Mapping[str, WeightPlaces]) -> Iterator[str]:
    used = set()
    for tensor in outside:
        place = {entry.key: entry.value for entry in tensor.external_data}
        location = place.get("location", "")
        used.add(location)
        if location not in network.weights or location not in files:
            yield f"weight {tensor.name} lies in {location!r}, which the manifest does not give this network"
        else:
            finding = _place_finding(tensor, place, files[location])
            if finding:
                yield f"weight {tensor.name} in {location} {finding}"
    for location in sorted(set(network.weights) - used):
        yield f"the manifest gives it {location}, which it does not use"


def _place_finding(tensor: TensorProto, place: Mapping[str, str], file: WeightPlaces) -> str | None:
    """Return what is wrong with the byte range of one weight, or None."""
    type_name = _type_name(tensor.data_type)
    if type_name not in _STORED:
        return f"is of type {type_name}, which no weight file has"
    stored_type, item = _STORED[type_name]
    if len(tensor.dims) > _MOST_AXES or not all(0 <= axis <= 2 * file.size for axis in tensor.dims):
        return "is of an impossible shape"
    shape, size = tuple(tensor.dims), int(math.prod(tensor.dims) * item)
    if type_name == "INT4":
        shape = (size,)
    try:
        offset, length = int(place["offset"]), int(place["length"])
    except (KeyError, ValueError):
        return "has no byte range"
    if length != size:
        return f"has {length:,} bytes, where {type_name} of {list(tensor.dims)} has {size:,}"
    if offset < 0 or offset + length > file.size:
        return f"ends at byte {offset + length:,} of {file.size:,}"
    if file.tensors is None:
        return None
    known = file.tensors.get((offset, length), [])
    if (stored_type, shape) in known:
        return None
    if not known:
        return f"begins at byte {offset:,} and has {length:,}, and no tensor of the file does"
    return f"is {stored_type} of {list(shape)}, and {known[0][0]} of {list(known[0][1])} in the file"


def _type_name(number: int) -> str:
    return str(TensorProto.DataType.Name(number)) if number in TensorProto.DataType.values() else f"number {number}"


def _interface_findings(kind: str, values: list[onnx.ValueInfoProto], specs: tuple[TensorSpec, ...]) -> Iterator[str]:
    found, told = [value.name for value in values], [spec.name for spec in specs]
    if found != told:
        yield f"its {kind}s are {', '.join(found)}, and {', '.join(told)} in the manifest"
        return
    for value, spec in zip(values, specs, strict=True):
        graph, manifest = _described(value), f"{spec.dtype} ({', '.join(map(str, spec.shape))})"
        if graph != manifest:
            yield f"{kind} {spec.name} is {graph}, and {manifest} in the manifest"


def _described(value: onnx.ValueInfoProto) -> str:
    """Return type and shape as the manifest has them."""
    tensor = value.type.tensor_type
    type_name = _type_name(tensor.elem_type)
    sizes = [str(dim.dim_value) if dim.HasField("dim_value") else dim.dim_param or "?" for dim in tensor.shape.dim]
    return f"{_BOUNDARY.get(type_name, type_name.lower())} ({', '.join(sizes)})"


def _become_inputs(graph: onnx.GraphProto, outside: list[TensorProto]) -> None:
    inputs = [onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims) for tensor in outside]
    kept = [tensor for tensor in graph.initializer if not _is_outside(tensor)]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    graph.input.extend(inputs)


def _structure_findings(model: onnx.ModelProto) -> Iterator[str]:
    """Yield what the checker says, and strict shape inference with the values of constants followed.

    The checker's ``full_check`` is the same without following constants, and so misses what a Reshape makes.
    """
    try:
        onnx.checker.check_model(model)
    except Exception as error:
        yield f"onnx.checker: {reason(error, _LONGEST)}"
    try:
        onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    except Exception as error:
        yield f"shape inference: {reason(error, _LONGEST)}"
