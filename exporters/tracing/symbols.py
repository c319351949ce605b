"""Sizes that are chosen when an engine is built, not when a network is traced: batch, latent height, latent width.

A network is traced at fixed, large, prime sizes (fake tensors make size free). In the traced graph such a size, or a
multiple of it, can be nothing else than the axis it stands for, so every constant that holds one is replaced by its
formula over the sizes of the graph's inputs. Against torch's own symbolic shapes this traces three times faster, and
leaves three nodes a distinct shape rather than a graph of Shape, Gather and Concat after every operator.
"""

import math
from collections.abc import Collection, Iterable

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from cvx_deploy.bundle.schema import TensorSpec

# Larger than any other size in a graph, and no small multiple of one is near a small multiple of another.
PRIMES = {"batch": 1_000_033, "latent_height": 100_003, "latent_width": 1_000_003}
_MAX_PADDING = 2

Term = tuple[str, ...]


def make_symbolic(model: ir.Model, inputs: tuple[TensorSpec, ...]) -> None:
    """Turn every size of a graph that was traced at `PRIMES` into its symbol, in place.

    Before::

        Reshape(x, [1, 128, 800024, 8000024])

    After::

        Reshape(x, [1, 128, 0, 0] + [0, 0, 8, 0] * latent_height + [0, 0, 0, 8] * latent_width)

    Args:
        model: The graph, whose inputs have the names and symbolic shapes of `inputs`.
        inputs: The contract's inputs.
    """
    formulas = _Formulas(model.graph, inputs)
    for node in list(model.graph):
        if node.op_type == "Constant":
            tensor = _integers(node)
            if tensor is not None and (terms := _terms(tensor, formulas.sizes)):
                node.outputs[0].replace_all_uses_with(formulas.value(tensor, terms))
        for output in node.outputs:
            if output.shape is not None:
                output.shape = ir.Shape(symbolic_size(size, formulas.sizes) for size in output.shape)


def symbolic_size(size: int | ir.SymbolicDim, symbols: Collection[str]) -> int | str | ir.SymbolicDim:
    """Return a traced size as its formula, such as ``8*latent_height+1``, or as it is when it has no symbol."""
    if not isinstance(size, int):
        return size
    factor, term, padding = _formula(size, symbols)
    if not term:
        return size
    names = "*".join(term)
    return (names if factor == 1 else f"{factor}*{names}") + (f"+{padding}" if padding else "")


def _formula(size: int, symbols: Collection[str]) -> tuple[int, Term, int]:
    """Write a size as a plain factor times symbols plus a little padding; without symbols it is all factor."""
    for padding in range(_MAX_PADDING + 1):
        rest = size - padding
        term = tuple(name for name in symbols if rest > 0 and rest % PRIMES[name] == 0)
        if term:
            return rest // math.prod(PRIMES[name] for name in term), term, padding
    return size, (), 0


def _integers(node: ir.Node) -> NDArray[np.int64] | None:
    """Return a Constant node's integers, whichever attribute holds them."""
    for name in ("value", "value_int", "value_ints"):
        attribute = node.attributes.get(name)
        if attribute is not None:
            array = attribute.value.numpy() if name == "value" else np.asarray(attribute.value)
            return array.astype(np.int64) if np.issubdtype(array.dtype, np.integer) else None
    return None


def _terms(array: NDArray[np.int64], symbols: Collection[str]) -> dict[Term, NDArray[np.int64]]:
    """Write an integer array as a sum of factors times symbols; empty when it holds no symbol."""
    terms: dict[Term, NDArray[np.int64]] = {}
    for position, size in np.ndenumerate(array):
        factor, term, padding = _formula(int(size), symbols)
        terms.setdefault(term, np.zeros_like(array))[position] = factor
        if padding:
            terms.setdefault((), np.zeros_like(array))[position] = padding
    return terms if any(terms) else {}


class _Formulas:
    """Makes the nodes that compute symbolic constants, each distinct one once, at the start of the graph."""

    def __init__(self, graph: ir.Graph, inputs: tuple[TensorSpec, ...]) -> None:
        self.graph = graph
        self.start = graph[0]
        self.known: dict[tuple[object, ...], ir.Value] = {}
        self.sizes = self._find(inputs)

    def value(self, array: NDArray[np.int64], terms: dict[Term, NDArray[np.int64]]) -> ir.Value:
        """Return the sum of ``factors * symbols`` that equals `array` at the traced sizes."""
        key = (array.shape, *array.flat)
        if key not in self.known:
            plain = terms.get((), np.zeros_like(array))
            total = self._constant(plain)
            for term, factors in terms.items():
                if term:
                    size = self._product(self.sizes[name] for name in term)
                    total = self._node("Add", total, self._node("Mul", self._constant(factors), size))
            if array.ndim == 0:
                total = self._node("Squeeze", total)
            self.known[key] = total
        return self.known[key]

    def _find(self, inputs: tuple[TensorSpec, ...]) -> dict[str, ir.Value]:
        """Return every symbol's value: the size of an input axis, over the factor that axis has."""
        found: dict[str, ir.Value] = {}
        for value, spec in zip(self.graph.inputs, inputs, strict=True):
            for axis, symbol in enumerate(spec.shape):
                factor, _, name = str(symbol).rpartition("*")
                if name in PRIMES and name not in found:
                    size = self._insert(ir.node("Shape", [value], attributes={"start": axis, "end": axis + 1}))
                    found[name] = self._node("Div", size, self._constant(np.int64(factor))) if factor else size
        return found

    def _product(self, sizes: Iterable[ir.Value]) -> ir.Value:
        first, *rest = sizes
        for size in rest:
            first = self._node("Mul", first, size)
        return first

    def _constant(self, array: NDArray[np.int64] | np.int64) -> ir.Value:
        return self._insert(ir.node("Constant", [], attributes={"value": ir.tensor(np.atleast_1d(array))}))

    def _node(self, op_type: str, *inputs: ir.Value) -> ir.Value:
        return self._insert(ir.node(op_type, list(inputs)))

    def _insert(self, node: ir.Node) -> ir.Value:
        self.graph.insert_before(self.start, node)
        node.outputs[0].dtype = ir.DataType.INT64
        return node.outputs[0]
