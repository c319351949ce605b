"""The fusion gate: whether TensorRT compiled a network as it ought to, told from the compiled plan.

What is judged:

- attention: each is one fused kernel. In float32 there is no such kernel, and the finding is a note.
- scores: no activation of tokens x tokens is written or read; one of a full-size video would not fit in any memory.
- quantized: a linear layer between dequantized tensors runs in int8 or fp8.
- float32: a network in a half type multiplies in it. Norms and modulations may compute in float32 inside a kernel;
  what they hand on in float32 is noted with its traffic.
- reformat: no kernel only changes a tensor's layout or type, but for the network's inputs and outputs. TensorRT's own
  Reformat layers and casts that stand alone fail. Transposes and copies it compiled from the graph's own are noted.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from cvx_deploy.engines.tensorrt.compiled_plan import CompiledPlan
from cvx_deploy.engines.tensorrt.kernels import Kernel, KernelTensor
from cvx_deploy.families.expectation import Expectation
from cvx_deploy.precision import Precision

if TYPE_CHECKING:
    import onnx

Severity = Literal["failure", "note"]
Rule = Literal["attention", "scores", "quantized", "float32", "reformat"]
_QUANTIZED_TYPES = {"int8", "float8", "int4", "float4"}
_LINEAR = {"MatMul", "Gemm", "Conv"}


@dataclass(frozen=True)
class NetworkFacts:
    """What the gate must know of the ONNX graph that was compiled.

    Attributes:
        role: Such as transformer or vae_decoder_next.
        expectation: What this kind of network is expected to compile to.
        precision: What it computes in.
        attentions: Names of its Attention nodes, and of the Softmax nodes where attention is decomposed.
        tokens: Sequence lengths that attention runs over.
        quantized: Names of MatMul, Gemm and Conv nodes whose activation and weight are both dequantized.
        widths: Last sizes of its weights, which could be mistaken for sequence lengths.
    """

    role: str
    expectation: Expectation
    precision: Precision
    attentions: tuple[str, ...]
    tokens: tuple[int, ...]
    quantized: tuple[str, ...] = ()
    widths: tuple[int, ...] = ()


def facts_from_graph(
    graph: "onnx.GraphProto", role: str, expectation: Expectation, precision: Precision
) -> NetworkFacts:
    """Read the facts from an ONNX graph; shapes are those it notes for its inner tensors (``value_info``)."""
    shapes = {value.name: _known_sizes(value) for value in (*graph.value_info, *graph.input)}
    attentions = [node for node in graph.node if node.op_type in ("Attention", "Softmax")]
    dequantized = {node.output[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    lengths: set[int] = set()
    for node in attentions:
        # Attention takes (..., tokens, channels) twice, Softmax (..., tokens, tokens).
        read = [shapes.get(name, ()) for name in node.input[: 2 if node.op_type == "Attention" else 1]]
        lengths.update(shape[-2] for shape in read if len(shape) > 1)
    weights = [weight.dims for weight in graph.initializer if len(weight.dims) == 2]
    return NetworkFacts(
        role=role,
        expectation=expectation,
        precision=precision,
        attentions=tuple(node.name for node in attentions),
        tokens=tuple(sorted(lengths - {-1})),
        quantized=tuple(
            node.name for node in graph.node if node.op_type in _LINEAR and dequantized.issuperset(node.input[:2])
        ),
        # A table of tokens x tokens says nothing about widths.
        widths=tuple(sorted({size for dims in weights if not lengths.issuperset(dims) for size in dims})),
    )


def _known_sizes(value: "onnx.ValueInfoProto") -> tuple[int, ...]:
    return tuple(axis.dim_value if axis.HasField("dim_value") else -1 for axis in value.type.tensor_type.shape.dim)


@dataclass(frozen=True)
class Finding:
    """One thing that is not as it ought to be.

    Attributes:
        block: The block of the network it is in, if it is in one.
        bytes: What the kernels in question read and write; None where a size is chosen at run time.
    """

    severity: Severity
    rule: Rule
    block: str | None
    what: str
    bytes: int | None = None

    def __str__(self) -> str:
        place = f"{self.block}: " if self.block else ""
        return f"{self.severity} ({self.rule}): {place}{self.what}"


@dataclass(frozen=True)
class Findings:
    """What the gate found in one plan.

    Attributes:
        attentions: How many attentions the graph has, and `fused_attentions` how many of them are one kernel.
        fused: What did fuse, in words: a line for each attention, and one for each type that quantized layers, and
            quantized attentions, run in.
    """

    role: str
    targets: tuple[str, ...]
    attentions: int
    fused_attentions: int
    fused: tuple[str, ...]
    found: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing failed."""
        return not self.failures

    @property
    def failures(self) -> tuple[Finding, ...]:
        """What fails the gate."""
        return tuple(finding for finding in self.found if finding.severity == "failure")

    @property
    def notes(self) -> tuple[Finding, ...]:
        """What costs time and does not fail it."""
        return tuple(finding for finding in self.found if finding.severity == "note")

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain values, ``ok`` included."""
        return {"ok": self.ok, **asdict(self)}

    def __str__(self) -> str:
        verdict = "compiled as expected" if self.ok else f"{len(self.failures)} expectations failed"
        lines = [f"{self.role}: {verdict}"]
        if self.attentions:
            lines.append(f"{self.fused_attentions} of {self.attentions} attentions are one fused kernel each")
        lines += self.fused[self.fused_attentions :]
        return "\n  ".join([*lines, *map(str, self.failures), *_summaries(self.notes)])


def _summaries(notes: tuple[Finding, ...]) -> Iterator[str]:
    """Yield one line for the notes of each rule: a deep network has the same ones in every block."""
    for rule in dict.fromkeys(note.rule for note in notes):
        same = [note for note in notes if note.rule == rule]
        others = f", and so in {len(same) - 1} more places" if len(same) > 1 else ""
        known = sum(note.bytes for note in same if note.bytes is not None)
        traffic = f" ({known / 1e6:.3g} MB read and written in all)" if known else ""
        yield f"{same[0]}{others}{traffic}"


def judge(plan: CompiledPlan, facts: NetworkFacts) -> Findings:
    """Compare a compiled plan with what its network's graph leads one to expect."""
    fused = {name: kernels[0] for name in facts.attentions if len(kernels := _attention_kernels(plan, name)) == 1}
    lines = [
        f"{kernel.block or name}: attention is one kernel, {kernel.name} in {kernel.operand_type}"
        for name, kernel in fused.items()
    ]
    found = (
        *_judge_attention(plan, facts),
        *_judge_scores(plan, facts),
        *_judge_quantized(plan, facts),
        *_judge_float32(plan, facts),
        *_judge_reformats(plan),
    )
    lines += _quantized_lines(plan, facts)
    return Findings(facts.role, plan.targets, len(facts.attentions), len(fused), tuple(lines), found)


def _attention_kernels(plan: CompiledPlan, name: str) -> list[Kernel]:
    return [kernel for kernel in plan.kernels if kernel.kind == "attention" and name in kernel.layers]


def _severity(facts: NetworkFacts) -> Severity:
    """Return how bad attention in pieces is: no fused kernel computes in float32."""
    return "failure" if facts.expectation.attention == "fused" and facts.precision != "fp32" else "note"


def _judge_attention(plan: CompiledPlan, facts: NetworkFacts) -> Iterator[Finding]:
    if facts.expectation.attention != "none" and not facts.attentions:
        yield Finding("failure", "attention", None, "its graph has no Attention and no Softmax node")
    for name in facts.attentions:
        fused = _attention_kernels(plan, name)
        if len(fused) != 1:
            parts = fused or [kernel for kernel in plan.kernels if name in kernel.layers]
            listed = ", ".join(f"{part.name} ({part.kind})" for part in parts) or "no kernel the plan names"
            what = f"{name} is not one fused kernel; it runs in {listed}"
            block = parts[0].block if parts else None
            yield Finding(_severity(facts), "attention", block, what, _traffic(parts))
    for kernel in plan.kernels:
        if kernel.kind == "attention" and set(facts.attentions).isdisjoint(kernel.layers):
            what = f"{kernel.name} is an attention kernel that belongs to no attention of the graph"
            yield Finding("failure", "attention", kernel.block, what, kernel.traffic)


def _judge_scores(plan: CompiledPlan, facts: NetworkFacts) -> Iterator[Finding]:
    if facts.attentions and not facts.tokens:
        what = "the graph does not say how long the sequence is, so a tokens x tokens tensor cannot be told"
        yield Finding("failure", "scores", None, what)
    for tokens in facts.tokens:
        alike = [width for width in facts.widths if width % tokens == 0]
        if alike:
            what = f"{tokens} tokens cannot be told from a width of {alike[0]}, so this rule was not applied"
            yield Finding("note", "scores", None, what)
            continue
        handles = partial(_handles_scores, tokens=tokens)
        for block, kernels in _by_block(plan, handles).items():
            what = f"{tokens} x {tokens} scores are written or read by {_names(kernels)}"
            yield Finding(_severity(facts), "scores", block, what, _traffic(kernels))


def _handles_scores(kernel: Kernel, tokens: int) -> bool:
    """Whether an activation it reads or writes is of tokens x tokens."""
    return any(_is_square(tensor, tokens) for tensor in (*kernel.inputs, *kernel.outputs))


def _is_square(tensor: KernelTensor, tokens: int) -> bool:
    """Whether one axis is the sequence and another is too, alone or merged with batch and heads."""
    axes = list(tensor.shape)
    if tokens not in axes:
        return False
    axes.remove(tokens)
    return any(size > 0 and size % tokens == 0 for size in axes)


def _judge_quantized(plan: CompiledPlan, facts: NetworkFacts) -> Iterator[Finding]:
    for name in facts.quantized:
        doing = _matrix_kernels(plan, name)
        if not doing:
            yield Finding(
                "failure", "quantized", None, f"{name} is dequantized and no gemm or convolution stands for it"
            )
        for kernel in doing:
            if not _is_quantized(kernel):
                what = f"{name} is dequantized and does not run quantized, in {kernel.name}"
                yield Finding("failure", "quantized", kernel.block, what, kernel.traffic)


def _quantized_lines(plan: CompiledPlan, facts: NetworkFacts) -> Iterator[str]:
    doing = [_matrix_kernels(plan, name) for name in facts.quantized]
    attentions = [kernels for kernels in doing if kernels and kernels[0].kind == "attention"]
    layers = [kernels for kernels in doing if kernels not in attentions]
    for what, group in (("layers", layers), ("attentions", attentions)):
        types = Counter(kernels[0].operand_type for kernels in group if kernels and all(map(_is_quantized, kernels)))
        yield from (f"{count} of {len(group)} quantized {what} run in {dtype}" for dtype, count in types.items())


def _matrix_kernels(plan: CompiledPlan, name: str) -> list[Kernel]:
    return [kernel for kernel in plan.kernels if kernel.computes and name in kernel.layers]


def _is_quantized(kernel: Kernel) -> bool:
    """Whether both what it multiplies and what it multiplies it with are quantized; attention has no constants."""
    if kernel.kind == "attention":
        return all(tensor.dtype in _QUANTIZED_TYPES for tensor in kernel.inputs if not tensor.is_scalar)
    sides = (kernel.inputs, kernel.constants)
    return all(any(tensor.dtype in _QUANTIZED_TYPES and not tensor.is_scalar for tensor in side) for side in sides)


def _judge_float32(plan: CompiledPlan, facts: NetworkFacts) -> Iterator[Finding]:
    if facts.precision == "fp32":
        return
    for kernel in plan.kernels:
        expected = any(word in layer for layer in kernel.layers for word in facts.expectation.float32)
        if _multiplies_in_float32(kernel) and not expected:
            what = f"{kernel.name} ({kernel.kind}) multiplies in float32"
            yield Finding("failure", "float32", kernel.block, what, kernel.traffic)

    def hands_on(kernel: Kernel) -> bool:
        written = any(tensor.dtype == "float32" and tensor.name not in plan.io for tensor in kernel.outputs)
        return written and not _multiplies_in_float32(kernel)

    for block, kernels in _by_block(plan, hands_on).items():
        what = f"float32 activations are written by {_names(kernels)}"
        yield Finding("note", "float32", block, what, _traffic(kernels))


def _multiplies_in_float32(kernel: Kernel) -> bool:
    return kernel.computes and kernel.operand_type == "float32"


def _judge_reformats(plan: CompiledPlan) -> Iterator[Finding]:
    for kernel in plan.kernels:
        if _is_reformat(kernel) and not plan.touches_io(kernel):
            what = f"{kernel.name} only turns {_shape(kernel.inputs)} to {_shape(kernel.outputs)}"
            yield Finding("failure", "reformat", kernel.block, what, kernel.traffic)

    def moves(kernel: Kernel) -> bool:
        return kernel.kind == "copy" and not _is_reformat(kernel) and not plan.touches_io(kernel)

    for block, kernels in _by_block(plan, moves).items():
        yield Finding("note", "reformat", block, f"data is only moved by {_names(kernels)}", _traffic(kernels))


def _is_reformat(kernel: Kernel) -> bool:
    return kernel.type.lower() == "reformat" or set(kernel.operations) == {"Cast"}


def _by_block(plan: CompiledPlan, concerns: Callable[[Kernel], bool]) -> dict[str | None, list[Kernel]]:
    found: dict[str | None, list[Kernel]] = {}
    for kernel, block in zip(plan.kernels, plan.blocks, strict=True):
        if concerns(kernel):
            found.setdefault(block, []).append(kernel)
    return found


def _names(kernels: list[Kernel]) -> str:
    some = ", ".join(kernel.name for kernel in kernels[:3])
    return f"{len(kernels)} kernel{'s' * (len(kernels) > 1)}, {some}" + ", ..." * (len(kernels) > 3)


def _shape(tensors: tuple[KernelTensor, ...]) -> str:
    return " and ".join(f"{tensor.dtype} ({', '.join(map(str, tensor.shape))})" for tensor in tensors)


def _traffic(kernels: list[Kernel]) -> int | None:
    sizes = [kernel.traffic for kernel in kernels]
    return None if None in sizes else sum(size for size in sizes if size is not None)
