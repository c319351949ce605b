"""The compiled plan: the kernels TensorRT made of a network, read from its build's messages or from its inspector.

TensorRT and TensorRT-RTX write one VERBOSE message that begins with ``Layers:`` and lists every kernel, when the
builder's profiling verbosity is DETAILED. Reading it needs no GPU; the engine inspector needs one.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal

import msgspec

from cvx_deploy.engines.tensorrt.kernels import Kernel, KernelTensor
from cvx_deploy.errors import EngineError
from cvx_deploy.reading import reading

SCHEMA_VERSION = 1
Source = Literal["build messages", "engine inspector"]

_HEADING = "Layers:\n"
_AGAIN = "build the engine again with this version of cvx-deploy, or report the message and the library's version"
_KERNEL = re.compile(
    r"Name: (?P<name>.*?), LayerType: (?P<type>[^,]*), Inputs: (?P<inputs>\[.*?\]), Constants: (?P<constants>\[.*?\]), "
    r"Outputs: (?P<outputs>\[.*?\]), TacticName: (?P<tactic>.*?), StreamId: (?P<stream>\d+)(?:, EventId: \d+)?, "
    r"Metadata:(?P<metadata>.*)"
)
_TENSOR = re.compile(r"\{ Name: (.*?), Dimensions: \[([-\d,]*)\], .*?Datatype: (\w+), Format: .*?\}(?=, \{|\])")
_IO = re.compile(r"^ *Name: (.*?), IOMode: ", re.MULTILINE)
_MEMORY = re.compile(r"Total (Activation|Weights) Memory: (\d+) bytes")
_PROFILE = re.compile(r" \[profile (\d+)\]")
_GRAPH = re.compile(r"_myl(\d+)_\d+$")
_DTYPES = {
    "Float": "float32",
    "FP32": "float32",
    "Half": "float16",
    "FP16": "float16",
    "BFloat16": "bfloat16",
    "BF16": "bfloat16",
    "FP8": "float8",
    "Int8": "int8",
    "INT8": "int8",
    "UInt8": "uint8",
    "Int32": "int32",
    "INT32": "int32",
    "Int64": "int64",
    "INT64": "int64",
    "Bool": "bool",
    "BOOL": "bool",
    "Int4": "int4",
    "INT4": "int4",
    "FP4": "float4",
    "E8M0": "float8_e8m0",
}


@dataclass(frozen=True)
class CompiledPlan:
    """What one network was compiled to, for one range of sizes.

    Attributes:
        source: Where it was read.
        targets: Compute capabilities such as sm89 it was compiled for; none for the GPU it was built on.
        profile: The optimization profile, from 0.
        io: Names of the network's own inputs and outputs.
        kernels: In the order they run.
        activation_bytes: Memory for everything between kernels; None where the source does not say.
        weights_bytes: Memory for the weights; likewise.
    """

    schema_version: int
    source: Source
    targets: tuple[str, ...]
    profile: int
    io: tuple[str, ...]
    kernels: tuple[Kernel, ...]
    activation_bytes: int | None
    weights_bytes: int | None

    @property
    def is_partial(self) -> bool:
        """Whether some kernel's sizes are chosen at run time, so that sums leave it out."""
        return any(kernel.traffic is None for kernel in self.kernels)

    @cached_property
    def blocks(self) -> tuple[str | None, ...]:
        """The block of every kernel; one that stands for no ONNX layer counts with the kernel before it."""
        found: list[str | None] = []
        for kernel in self.kernels:
            found.append(kernel.block if kernel.layers or not found else found[-1])
        return tuple(found)

    @property
    def block_order(self) -> tuple[str | None, ...]:
        """Its blocks in the order they run, by the middle of their kernels, and None last where there is such."""
        places: dict[str | None, list[int]] = {}
        for place, block in enumerate(self.blocks):
            places.setdefault(block, []).append(place)
        return tuple(sorted(places, key=lambda block: (block is None, places[block][len(places[block]) // 2])))

    def touches_io(self, kernel: Kernel) -> bool:
        """Whether a kernel reads an input of the network or writes an output."""
        return any(tensor.name in self.io for tensor in (*kernel.inputs, *kernel.outputs))

    def to_json(self) -> bytes:
        """Return the text of ``plan.json``; what follows from the shapes is written out as well, for its readers."""
        values = asdict(self)
        values["kernels"] = [
            _kernel_values(kernel, block) for kernel, block in zip(self.kernels, self.blocks, strict=True)
        ]
        return msgspec.json.format(msgspec.json.encode(values), indent=2) + b"\n"

    @classmethod
    def from_json(cls, text: bytes) -> "CompiledPlan":
        """Read what `to_json` wrote.

        Raises:
            EngineError: It is no plan, or another version's.
        """
        with reading("the compiled plan", EngineError, fix=_AGAIN, says="cannot be read"):
            plan = msgspec.json.decode(text, type=cls)
        if plan.schema_version != SCHEMA_VERSION:
            raise EngineError(
                f"the compiled plan has schema version {plan.schema_version}, not {SCHEMA_VERSION}", fix=_AGAIN
            )
        return plan


def _kernel_values(kernel: Kernel, block: str | None) -> dict[str, Any]:
    return {
        **asdict(kernel),
        "kind": kernel.kind,
        "block": block,
        "bytes_in": kernel.bytes_in,
        "bytes_constants": kernel.bytes_constants,
        "bytes_out": kernel.bytes_out,
        "flops": kernel.flops,
    }


def plans_from_messages(messages: Sequence[str], targets: Sequence[str] = ()) -> tuple[CompiledPlan, ...]:
    """Read the plans of one build from its messages.

    Args:
        messages: Everything the builder logged, one message each, VERBOSE ones too.
        targets: The compute capabilities it was built for, in that order, such as sm89. The messages do not name
            them: one list of kernels is taken for all of them, as many lists as targets for one each.

    Returns:
        A plan for every list of kernels and every optimization profile in it.

    Raises:
        EngineError: No message lists the kernels, or its format is not the known one.
    """
    places = [place for place, message in enumerate(messages) if message.startswith(_HEADING)]
    if not places:
        raise EngineError(
            'the build\'s messages list no kernels (none begins with "Layers:")',
            fix="build with ProfilingVerbosity.DETAILED and a logger that keeps VERBOSE messages",
        )
    if len(places) > 1 and len(places) != len(targets):
        raise EngineError(f"the build lists its kernels {len(places)} times, for {len(targets)} targets", fix=_AGAIN)
    shares = [tuple(targets)] if len(places) == 1 else [(target,) for target in targets]
    plans = []
    for (before, place), share in zip(pairwise([0, *places]), shares, strict=True):
        memory = {found[1]: int(found[2]) for text in messages[before:place] if (found := _MEMORY.match(text))}
        listed, _, rest = messages[place].removeprefix(_HEADING).partition("\n\n")
        kernels = [_kernel_from_line(line) for line in listed.split("\n") if line.strip()]
        plans += _by_profile(kernels, _IO.findall(rest), "build messages", share, memory)
    return tuple(plans)


def _kernel_from_line(line: str) -> Kernel:
    found = _KERNEL.fullmatch(line)
    if found is None:
        raise EngineError(f"the build lists a kernel in an unknown format: {line.strip()[:120]}", fix=_AGAIN)
    return Kernel(
        name=found["name"],
        type=found["type"],
        tactic=found["tactic"],
        inputs=_tensors(found["inputs"]),
        constants=_tensors(found["constants"]),
        outputs=_tensors(found["outputs"]),
        layers=_layers(found["metadata"]),
        stream=int(found["stream"]),
    )


def _tensors(text: str) -> tuple[KernelTensor, ...]:
    found = [
        _tensor(name, map(int, filter(None, sizes.split(","))), word) for name, sizes, word in _TENSOR.findall(text)
    ]
    if len(found) != text.count("{ Name: "):
        raise EngineError(f"the build lists a tensor in an unknown format: {text[:120]}", fix=_AGAIN)
    return tuple(found)


def _tensor(name: str, sizes: Iterable[int], word: str) -> KernelTensor:
    return KernelTensor(name, tuple(sizes), _DTYPES.get(word, word))


def _layers(metadata: str) -> tuple[str, ...]:
    """Return the ONNX names in ``[ONNX Layer: a]<US>[ONNX Layer: b]``; the separator is the unit separator, 0x1f."""
    parts = (part.strip() for part in re.split(r"\x1f|(?<=\])(?=\[ONNX Layer: )", metadata))
    return tuple(part.removeprefix("[ONNX Layer: ").removesuffix("]") for part in parts if part)


def plans_from_inspector(text: str | bytes, targets: Sequence[str] = ()) -> tuple[CompiledPlan, ...]:
    """Read the plans of an engine from ``IEngineInspector.get_engine_information(LayerInformationFormat.JSON)``.

    Reads the schema of TensorRT 10 (``Bindings``, ``Format/Datatype``) and of TensorRT 11 (``I/O Tensors``). The
    inspector does not tell memory, so both sizes are None.

    Raises:
        EngineError: It is not that JSON, or the engine was not built with detailed profiling verbosity.
    """
    with reading("the engine inspector's answer", EngineError, fix=_AGAIN, says="cannot be read"):
        told = msgspec.json.decode(text, type=dict[str, Any])
        layers = told["Layers"]
    if not layers or not all(isinstance(layer, dict) and "LayerType" in layer for layer in layers):
        raise EngineError(
            "the engine inspector tells no more than names",
            fix="build the engine with ProfilingVerbosity.DETAILED",
        )
    kernels = [_kernel_from_inspector(layer) for layer in layers]
    io = [
        entry["Name"] if isinstance(entry, dict) else entry
        for entry in told.get("I/O Tensors", told.get("Bindings", []))
    ]
    return tuple(_by_profile(kernels, io, "engine inspector", tuple(targets), {}))


def _kernel_from_inspector(layer: dict[str, Any]) -> Kernel:
    sides = {
        side: tuple(_tensor(told["Name"], told["Dimensions"], _type_word(told)) for told in layer.get(side, ()))
        for side in ("Inputs", "Constants", "Outputs")
    }
    return Kernel(
        name=layer["Name"],
        type=layer["LayerType"],
        tactic=layer.get("TacticName", ""),
        inputs=sides["Inputs"],
        constants=sides["Constants"],
        outputs=sides["Outputs"],
        layers=_layers(layer.get("Metadata", "")),
        stream=layer.get("StreamId", 0),
    )


def _type_word(told: dict[str, Any]) -> str:
    """Return the element type's word: ``Datatype``, or the one inside ``Row major linear FP16 format``."""
    if "Datatype" in told:
        return str(told["Datatype"])
    format_words = re.findall(r"\w+", str(told.get("Format/Datatype", "")))
    return next((word for word in format_words if word in _DTYPES), "unknown")


def _by_profile(
    kernels: list[Kernel], io: list[str], source: Source, targets: tuple[str, ...], memory: dict[str, int]
) -> list[CompiledPlan]:
    """Return a plan for each optimization profile.

    Names of profile 1 and later carry ``[profile 1]`` where they would clash. Kernels of one compiled graph
    (``_myl1_``) belong to one profile, so one such name tells it of them all.
    """
    by_graph: dict[str, int] = {}
    for kernel in kernels:
        graph = _graph_of(kernel)
        by_graph[graph] = max(by_graph.get(graph, 0), _profile_named(kernel))
    profiles = sorted(set(by_graph.values()))
    return [
        CompiledPlan(
            schema_version=SCHEMA_VERSION,
            source=source,
            targets=targets,
            profile=profile,
            io=tuple(dict.fromkeys(_PROFILE.sub("", name) for name in io)),
            kernels=tuple(_without_profile(kernel) for kernel in kernels if by_graph[_graph_of(kernel)] == profile),
            activation_bytes=memory.get("Activation"),
            weights_bytes=memory.get("Weights"),
        )
        for profile in profiles
    ]


def _graph_of(kernel: Kernel) -> str:
    found = _GRAPH.search(kernel.name)
    return found[1] if found else kernel.name


def _profile_named(kernel: Kernel) -> int:
    names = (kernel.name, *(tensor.name for tensor in (*kernel.inputs, *kernel.outputs)))
    return max((int(number) for name in names for number in _PROFILE.findall(name)), default=0)


def _without_profile(kernel: Kernel) -> Kernel:
    def plain(tensors: tuple[KernelTensor, ...]) -> tuple[KernelTensor, ...]:
        return tuple(replace(tensor, name=_PROFILE.sub("", tensor.name)) for tensor in tensors)

    return replace(
        kernel,
        name=_PROFILE.sub("", kernel.name),
        inputs=plain(kernel.inputs),
        constants=plain(kernel.constants),
        outputs=plain(kernel.outputs),
    )
