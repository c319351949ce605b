"""A kernel of a compiled plan: what it reads and writes, of what kind it is, and how much it computes."""

import math
import re
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

Kind = Literal["gemm", "attention", "convolution", "elementwise", "copy", "control"]
KINDS: tuple[Kind, ...] = get_args(Kind)

# Bits of an element, so that four-bit types count right.
_BITS = {
    **dict.fromkeys(("int64",), 64),
    **dict.fromkeys(("float32", "int32"), 32),
    **dict.fromkeys(("float16", "bfloat16"), 16),
    **dict.fromkeys(("int8", "uint8", "float8", "float8_e8m0", "bool"), 8),
    **dict.fromkeys(("int4", "float4"), 4),
}
_CONTROL = {"signal", "wait", "shape_call", "noop", "constant"}
_ATTENTION = re.compile(r"(^|_)f?mha")
_FUSED = re.compile(r"__myl_(\w+?)_myl\d+_\d+$")
_BLOCK = re.compile(r"\b(\w*blocks?\.\d+|mid_block)\b")
# Myelin's words for operations that only move or convert what they read.
_MOVES = {"Cast", "Conc", "Expa", "Move", "Repl", "Resh", "Slic", "Sque", "Tran"}


@dataclass(frozen=True)
class KernelTensor:
    """A tensor as a kernel sees it.

    Attributes:
        name: Its name in the plan; the same buffer may be seen with several shapes.
        shape: Sizes; -1 where the size is chosen at run time.
        dtype: Such as bfloat16; a type this program does not know keeps TensorRT's word for it.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def elements(self) -> int | None:
        """How many elements it has; None where that is chosen at run time."""
        return None if -1 in self.shape else math.prod(self.shape)

    @property
    def bytes(self) -> int | None:
        """Its size; None where it is chosen at run time, or the type is not known."""
        if self.elements is None or self.dtype not in _BITS:
            return None
        return (self.elements * _BITS[self.dtype] + 7) // 8

    @property
    def is_scalar(self) -> bool:
        """Whether it is one number, such as a gemm's alpha."""
        return self.elements == 1


@dataclass(frozen=True)
class Kernel:
    """One kernel, or one step between kernels.

    Attributes:
        type: TensorRT's word for it: gemm, kgen, runtime_fusion, correlation, ...
        tactic: Which implementation was chosen; a stub where the choice falls on the GPU.
        constants: What it reads that the engine holds: weights and tables.
        layers: The ONNX nodes it stands for, or helps to compute.
        stream: Kernels of different streams may run at the same time.
    """

    name: str
    type: str
    tactic: str
    inputs: tuple[KernelTensor, ...]
    constants: tuple[KernelTensor, ...]
    outputs: tuple[KernelTensor, ...]
    layers: tuple[str, ...]
    stream: int = 0

    @cached_property
    def operations(self) -> tuple[str, ...]:
        """The operations a fused kernel's name lists, four letters each (Resh, Tran, Fc); none for other kernels.

        A long list ends in Etc: then the kernel does more than it says.
        """
        found = _FUSED.match(self.name)
        return tuple(re.findall("[A-Z][a-z0-9]*", found[1])) if found else ()

    @cached_property
    def kind(self) -> Kind:
        """What it mostly does. Elementwise holds all that is neither: norms, reductions, pooling, resizing."""
        word = self.type.lower()
        if word in _CONTROL:
            return "control"
        if _ATTENTION.search(self.name) or _ATTENTION.search(self.tactic):
            return "attention"
        if "gemm" in word or "matrixmultiply" in word or "Fc" in self.operations or self._is_dot_product:
            return "gemm"
        if "conv" in word or word == "correlation" or "Corr" in self.operations:
            return "convolution"
        if word == "reformat" or (self.operations and _MOVES.issuperset(self.operations)):
            return "copy"
        return "elementwise"

    @property
    def bytes_in(self) -> int | None:
        """Bytes of activations it reads; what is listed twice with the same shape is read once."""
        return _bytes_of(self.inputs)

    @property
    def bytes_constants(self) -> int | None:
        """Bytes of weights and tables it reads."""
        return _bytes_of(self.constants)

    @property
    def bytes_out(self) -> int | None:
        """Bytes it writes."""
        return _bytes_of(self.outputs)

    @property
    def traffic(self) -> int | None:
        """Bytes it reads and writes; None where a size is chosen at run time."""
        parts = (self.bytes_in, self.bytes_constants, self.bytes_out)
        return None if None in parts else sum(part for part in parts if part is not None)

    @property
    def operand_type(self) -> str:
        """The narrowest type among what it multiplies: the one its arithmetic runs in."""
        matrices = [tensor for tensor in (*self.inputs, *self.constants) if not tensor.is_scalar]
        known = [tensor.dtype for tensor in matrices if tensor.dtype in _BITS]
        return min(known, key=lambda dtype: _BITS[dtype], default="unknown")

    @property
    def computes(self) -> bool:
        """Whether arithmetic on matrices is its business, and `flops` ought to be known."""
        return self.kind in ("gemm", "attention", "convolution")

    @cached_property
    def flops(self) -> int | None:
        """Multiplications and additions of a gemm, an attention or a convolution, from its shapes; None if unknown."""
        match self.kind:
            case "gemm":
                return self._gemm_flops()
            case "attention":
                return self._attention_flops()
            case "convolution":
                return self._convolution_flops()
            case _:
                return None

    @property
    def block(self) -> str | None:
        """The block of the network most of its ONNX layers are in; None for none, or for one kernel of many blocks."""
        found = Counter(match[1] for layer in self.layers if (match := _BLOCK.search(layer)))
        return found.most_common(1)[0][0] if 0 < len(found) <= 2 else None

    @property
    def _is_dot_product(self) -> bool:
        """Whether it is a matrix times one row, which is compiled to a product and a sum."""
        named = any(pair == ("Mul", "Sum") for pair in zip(self.operations, self.operations[1:], strict=False))
        return named and bool(self._weighted_depths())

    def _weighted_depths(self) -> list[tuple[int, KernelTensor]]:
        """Return K and the output for every constant ``(..., K, N)`` that takes an input's K to that output's N."""
        depths = {tensor.shape[-1] for tensor in self.inputs if tensor.shape}
        found = []
        for weight in self.constants:
            if sum(size > 1 for size in weight.shape) < 2 or weight.shape[-2] not in depths:
                continue
            made = [tensor for tensor in self.outputs if tensor.shape[-1:] == weight.shape[-1:]]
            if made:
                found.append((weight.shape[-2], made[0]))
        return found

    def _gemm_flops(self) -> int | None:
        products = self._weighted_depths() or self._activation_depths()
        if len(products) != max(self.operations.count("Fc"), 1):
            return None
        sizes = [made.elements for _, made in products]
        if None in sizes:
            return None
        return sum(2 * depth * size for (depth, _), size in zip(products, sizes, strict=True) if size is not None)

    def _activation_depths(self) -> list[tuple[int, KernelTensor]]:
        """Return the K of a product of two activations ``(..., M, K)`` and ``(..., K, N)``, and its output."""
        out = next((tensor for tensor in self.outputs if len(tensor.shape) > 1), None)
        if out is None:
            return []
        depths = {
            left.shape[-1]
            for left in self.inputs
            for right in self.inputs
            if left is not right
            and (left.shape[-2:-1], right.shape[-1:]) == (out.shape[-2:-1], out.shape[-1:])
            and left.shape[-1:] == right.shape[-2:-1]
        }
        return [(depth, out) for depth in depths]

    def _attention_flops(self) -> int | None:
        """Return the operations of ``q k^T`` and of its product with v; q, k and v are the first three inputs."""
        if len(self.inputs) < 3 or len(self.outputs) != 1:
            return None
        query, key, value = self.inputs[:3]
        scores, result = query.elements, self.outputs[0].elements
        if scores is None or result is None or min(map(len, (query.shape, key.shape, value.shape))) < 2:
            return None
        length, depth = value.shape[-2], query.shape[-1]
        if length < 0 or {length, depth} != set(key.shape[-2:]):
            return None
        return 2 * length * (scores + result)

    def _convolution_flops(self) -> int | None:
        for out in self.outputs:
            for weight in self.constants:
                same_rank = len(weight.shape) == len(out.shape) > 2
                if same_rank and weight.shape[0] == out.shape[1]:
                    return None if out.elements is None else 2 * out.elements * math.prod(weight.shape[1:])
        return None


def _bytes_of(tensors: tuple[KernelTensor, ...]) -> int | None:
    sizes = [tensor.bytes for tensor in dict.fromkeys(tensors)]
    return None if None in sizes else sum(size for size in sizes if size is not None)
