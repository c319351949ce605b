"""How much memory of this machine a run takes on a CPU's engine, and whether a limit allows it.

What counts is what the system cannot drop: mapped weight files are left out. The weights' part follows from the graphs;
what lies between operators is taken to be proportional to one tensor of a network, as in `cvx_deploy.estimate.memory`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from cvx_deploy.bundle.opened import Bundle
from cvx_deploy.engines.onnxruntime.graphs import streams
from cvx_deploy.engines.openvino.spec import streams as openvino_streams
from cvx_deploy.engines.residency import phase
from cvx_deploy.engines.spec import EngineName, Needed
from cvx_deploy.estimate.memory import (
    CPU_DECODER,
    CPU_HELD,
    CPU_STATE,
    CPU_TEXT,
    CPU_TRANSFORMER_TILED,
)
from cvx_deploy.graph.bounded import bounded_graph
from cvx_deploy.measure.units import size_text
from cvx_deploy.shape import Shape

PROCESS: Final = 200 << 20
"""Bytes of the interpreter, of NumPy and of an engine's library."""
_LARGE = 256 << 20
"""Bytes of weights below which nobody asks."""
_OPENVINO_UNITS = {"transformer": 8.0, "vae": 12.0}
_OPENVINO_HELD = 1.1  # of weights that it multiplies as they are stored
_OPENVINO_WIDENED = 2.1  # of weights it converts: those in the new type, and those arranged for its kernels
_INT4_HELD = 2.1  # in ONNX Runtime, with the scales in float32
_INT8_HELD = 1.1
_NODES = 4 << 20  # for each quarter of a thousand nodes
_BYTES = {1: 4.0, 10: 2.0, 16: 2.0, 3: 1.0, 2: 1.0, 17: 1.0, 21: 0.5, 22: 0.5}  # by ONNX's numbers of types
_WIDE = {"fp32": 4.0, "fp16": 2.0, "bf16": 2.0}
_PATCH = 2
_SIDE = 16  # pixels that a video's sides are multiples of


@dataclass(frozen=True)
class HostNeeds:
    """Bytes of this machine's memory, for each phase of a run: text, modulation, transformer, vae."""

    phases: Mapping[str, int]

    @property
    def at_once(self) -> int:
        """With every network loaded, and one of them running."""
        return PROCESS + sum(self.phases.values())

    @property
    def one_by_one(self) -> int:
        """With the networks of one phase loaded at a time."""
        return PROCESS + max(self.phases.values(), default=0)

    @property
    def largest(self) -> str:
        """The phase that takes most."""
        return max(self.phases, key=lambda name: self.phases[name], default="")


def host_needs(bundle: Bundle, engine: EngineName, needed: Needed) -> HostNeeds | None:
    """Return what a run takes; None where nobody need ask: on a GPU's engine, and of a small bundle.

    Args:
        bundle: What is run, seen at a shape.
        engine: What runs it.
        needed: Role and sizes of every network of the run.
    """
    if engine not in _HELD or sum(file.size for file in bundle.manifest.weights.values()) < _LARGE:
        return None
    return HostNeeds(_phases(bundle, engine, needed))


def _phases(bundle: Bundle, engine: EngineName, needed: Needed, share: float = 1.0) -> dict[str, int]:
    """Return what each phase takes, for a video of this share of the bundle's pixels."""
    held: dict[str, int] = {}
    between: dict[str, float] = {}
    for role, sizes in needed:
        weights, activations = _of_network(bundle, engine, role, sizes)
        name = phase(role)
        held[name] = held.get(name, 0) + weights
        between[name] = max(between.get(name, 0), activations * share)
    return {name: held[name] + math.ceil(between[name]) for name in held}


def _of_network(bundle: Bundle, engine: EngineName, role: str, sizes: Mapping[str, int]) -> tuple[int, int]:
    """Return the bytes that a network's weights take, and what lies between its operators."""
    graph = _graph(bundle, role)
    nodes = _NODES * (1 + graph.nodes // 250)
    held = _HELD[engine](bundle, role, graph.stored)
    return nodes + math.ceil(held), math.ceil(_UNITS[engine](phase(role)) * _unit(bundle, role, graph, sizes))


@dataclass(frozen=True)
class _Graph:
    """What counts of a network's graph.

    Attributes:
        nodes: How many it has.
        stored: How many values each weight outside of it has, and the bytes of one.
        kernels: Output and input channels of each convolution of videos, the fewer first.
    """

    nodes: int
    stored: tuple[tuple[int, float], ...]
    kernels: tuple[tuple[int, int], ...]


_Stored = Sequence[tuple[int, float]]
_seen: dict[str, _Graph] = {}  # by SHA-256: a large graph takes a tenth of a second, and every engine asks


def _graph(bundle: Bundle, role: str) -> _Graph:
    digest = bundle.network(role).file.sha256
    if digest not in _seen:
        graph = bounded_graph(bundle, role)[1].graph
        outside = [tensor for tensor in graph.initializer if tensor.external_data]
        stored = tuple((math.prod(tensor.dims), _BYTES.get(tensor.data_type, 4.0)) for tensor in outside)
        five = [tensor for tensor in graph.initializer if len(tensor.dims) == 5]
        kernels = tuple((min(tensor.dims[:2]), max(tensor.dims[:2])) for tensor in five)
        _seen[digest] = _Graph(len(graph.node), stored, kernels)
    return _seen[digest]


def _held_by_onnxruntime(bundle: Bundle, role: str, stored: _Stored) -> float:
    network = bundle.network(role)
    file_bytes = sum(bundle.manifest.weights[name].size for name in network.weights)
    if not role.startswith("vae") and streams(network, file_bytes):
        converted = sorted((4.0 * values for values, _ in stored), reverse=True)
        # One layer's, and the next one's; the largest is the embedding, looked up in its file.
        return sum(converted[1:3])
    scheme = None if network.quantization is None else network.quantization.scheme
    if scheme is not None:
        return {"int4wo": _INT4_HELD}.get(scheme, _INT8_HELD) * sum(values * size for values, size in stored)
    factor = CPU_HELD["vae_decoder" if role.startswith("vae") else "transformer"]
    return factor * 4.0 * sum(values for values, _ in stored)


def _held_by_openvino(bundle: Bundle, role: str, stored: _Stored) -> float:
    wide = _WIDE[bundle.network(role).precision]
    in_file = sum(values * size for values, size in stored)
    if openvino_streams(role, math.ceil(in_file)):
        return _OPENVINO_HELD * in_file
    embedding = max(stored, default=(0, 0.0)) if role == "text_encoder" else (0, 0.0)
    held = 0.0
    for values, size in stored:
        if size <= 1:
            held += _OPENVINO_HELD * values * size
        elif (values, size) != embedding:  # which is looked up in its file
            held += (_OPENVINO_WIDENED if size < wide else _OPENVINO_HELD) * values * wide
    return held


_HELD: Final[Mapping[EngineName, Callable[[Bundle, str, _Stored], float]]] = {
    "onnxruntime": _held_by_onnxruntime,
    "openvino": _held_by_openvino,
}
_UNITS: Final[Mapping[EngineName, Callable[[str], float]]] = {
    "onnxruntime": lambda name: {"transformer": CPU_TRANSFORMER_TILED, "vae": CPU_DECODER}.get(name, CPU_TEXT),
    "openvino": lambda name: _OPENVINO_UNITS.get(name, CPU_TEXT),
}


def _unit(bundle: Bundle, role: str, graph: _Graph, sizes: Mapping[str, int]) -> int:
    """Return the bytes of a network's typical tensor, in float32, its causal caches added to the VAE's."""
    network = bundle.network(role)
    shapes = {spec.name: spec.resolve(dict(sizes)) for spec in (*network.inputs, *network.outputs)}
    if role.startswith("vae"):
        pixels = max(math.prod(shape[2:]) for shape in shapes.values() if len(shape) == 5)
        channels = min(graph.kernels, default=(1, 1))[1]  # of what is made of three colours, or becomes them
        state = sum(math.prod(shapes[name]) for name in network.state)
        return 4 * pixels * channels + math.ceil(4 * state * CPU_STATE / CPU_DECODER)
    if phase(role) != "transformer":
        return 4 * max(math.prod(shape) for shape in shapes.values())
    batch, frames, _, height, width = shapes["hidden_states"]
    text = shapes["encoder_hidden_states"][1]
    steps = -(-frames // (bundle.manifest.traits.patch_size_t or 1))
    tokens = text + steps * (height // _PATCH) * (width // _PATCH)
    return 4 * batch * tokens * shapes["modulation"][-1]


def too_much(needs: HostNeeds, limit: int, why: str) -> str:
    """Return what is wrong with a run that takes more than a limit; empty where it fits, a phase at a time."""
    if needs.one_by_one <= limit:
        return ""
    takes = size_text(needs.one_by_one)
    return f"{_NAMES[needs.largest]} takes {takes} of memory, more than the {size_text(limit)} {why}"


_NAMES = {"text": "the text encoder", "modulation": "modulation", "transformer": "the transformer", "vae": "the VAE"}


def what_fits(bundle: Bundle, engines: Sequence[EngineName], needed: Needed, tiled: Needed, limit: int) -> str:
    """Return how to make a run of a bundle fit a limit: what is tried is estimated, and nothing is promised in vain.

    Args:
        bundle: What is to be run.
        engines: What can run it here, the one that was asked for first.
        needed: Role and sizes of every network of the run.
        tiled: Of the same run with ``--vae-tiling``.
        limit: Bytes.
    """
    for engine in engines:
        for words, networks in (("", needed), (" --vae-tiling", tiled)):
            needs = host_needs(bundle, engine, networks)
            if needs is not None and needs.one_by_one <= limit:
                return f"run it with --engine {engine}{words}, which takes {size_text(needs.one_by_one)}"
    for engine in engines:
        smaller = _smaller(bundle, engine, needed, limit)
        if smaller is not None:
            return f"export with --shape {smaller}, and run that with --engine {engine}"
    return "give it more memory, or export with --precision int8wo/fp32 and at a smaller --shape"


def _smaller(bundle: Bundle, engine: EngineName, needed: Needed, limit: int) -> Shape | None:
    """Return the largest size of the same proportions at which every phase fits; None where weights alone do not."""
    shape = bundle.shape
    for tenths in range(9, 1, -1):
        height, width = (side * tenths // (10 * _SIDE) * _SIDE for side in (shape.height, shape.width))
        share = height * width / (shape.height * shape.width)
        if height and width and HostNeeds(_phases(bundle, engine, needed, share)).one_by_one <= limit:
            return Shape(shape.frames, height, width)
    return None
