"""A bundle's ONNX network as a TensorRT network definition, its weights mapped from where they lie.

The weights never pass through protobuf or through a copy of ours: the parser is handed the address of each in the
mapped file. The maps must live as long as the network.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import onnx

from cvx_deploy.bundle.opened import Bundle
from cvx_deploy.bundle.schema import Network, dimension
from cvx_deploy.engines.tensorrt.libraries import Library
from cvx_deploy.engines.tensorrt.store import Profile
from cvx_deploy.engines.weights import mapped_weights
from cvx_deploy.errors import BundleError, EngineError
from cvx_deploy.graph.bounded import check_bounded, most_values
from cvx_deploy.progress import Progress
from cvx_deploy.reading import reading
from cvx_deploy.terminal import no_foreign_lines

Attention = Literal["fused", "decomposed", "none"]

# What would help with an operator that a parser refuses.
_REWRITES = {
    "SplitToSequence": "cvx-deploy export writes it as Split: export the bundle again",
    "SequenceAt": "cvx-deploy export writes it as Split: export the bundle again",
    "ReduceMean": "cvx-deploy export folds its axes into constants: export the bundle again",
    "Attention": "export with --precision bf16 or fp16, which have fused attention kernels",
}


@dataclass(frozen=True)
class ParsedNetwork:
    """A network the builder can take.

    Attributes:
        definition: TensorRT's ``INetworkDefinition``.
        held: What must not be let go of before the build ends: the parser, and the mapped weight files.
    """

    definition: Any
    held: tuple[Any, ...]


def onnx_model(bundle: Bundle, name: str) -> onnx.ModelProto:
    """Read one of the bundle's networks; weights outside of its file stay there."""
    stored = bundle.manifest.networks[name].file
    with reading(bundle.path / stored.path, BundleError, fix=bundle.remedy), no_foreign_lines():
        return check_bounded(bundle.content(stored), max(map(most_values, bundle.shapes)))


@contextlib.contextmanager
def parsed_network(
    library: Library, builder: Any, bundle: Bundle, name: str, profile: Profile, logger: Any, progress: Progress
) -> Iterator[ParsedNetwork]:
    """Yield one of the bundle's networks, parsed, with the sizes that `profile` fixes written into it.

    Raises:
        EngineError: The parser refuses it: which node, why, and what would help.
        BundleError: A weight file is missing or altered.
    """
    described = bundle.manifest.networks[name]
    model = onnx_model(bundle, name)
    _fix_sizes(model.graph, described, profile)
    api = library.module
    flags = 1 << int(api.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    definition = builder.create_network(flags)
    parser = api.OnnxParser(definition, logger)
    if not parser.load_model_proto(model.SerializeToString()):
        raise _refused(parser, library, name)
    weights = mapped_weights(bundle, name, model.graph, progress)
    for weight, content in weights.items():
        if not parser.load_initializer(weight, content.ctypes.data, content.nbytes):
            raise _refused(parser, library, name)
    if not parser.parse_model_proto():
        raise _refused(parser, library, name)
    yield ParsedNetwork(definition, (parser, weights))


def attention_layers(api: Any, definition: Any) -> list[Any]:
    """Return the attention operators (``IAttention``) of a network definition; `api` is the library's module."""
    found = []
    for index in range(definition.num_layers):
        layer = definition.get_layer(index)
        if layer.type == api.LayerType.ATTENTION_INPUT:
            layer.__class__ = api.IAttentionInputLayer  # the bindings hand out every layer as an ILayer
            found.append(layer.attention)
    return found


def _fix_sizes(graph: onnx.GraphProto, described: Network, profile: Profile) -> None:
    """Write the sizes that cannot vary into the graph's inputs and outputs, so that shapes are computed at once."""
    fixed = {symbol: least for symbol, (least, _, most) in profile.items() if least == most}
    specs = {spec.name: spec for spec in (*described.inputs, *described.outputs)}
    for value in (*graph.input, *graph.output):
        axes = value.type.tensor_type.shape.dim
        for axis, size in zip(axes, specs[value.name].shape, strict=True):
            if isinstance(size, str) and size.rpartition("*")[2] in fixed:
                axis.dim_value = dimension(size, fixed)


def _refused(parser: Any, library: Library, name: str) -> EngineError:
    """Say which node the parser refuses, and why."""
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    if not errors:
        return EngineError(f"{library.kind} cannot read the network {name}", fix="export the bundle again")
    first = errors[0]
    operator = first.node_operator()
    where = f"node {first.node_name()} ({operator})" if operator else "the graph"
    reason = " ".join(first.desc().split())
    report = f"report it with what cvx-deploy check --engine {library.kind} --reduce leaves of it"
    fix = _REWRITES.get(operator, f"{report}; until then run it with --engine onnxruntime")
    return EngineError(f"{library.kind} {library.version} refuses {where} of {name}: {reason}", fix=fix)
