"""A graph traced at prime sizes runs at any size once its constants have become formulas."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from cvx_deploy.bundle.schema import TensorSpec
from cvx_deploy.exporters.tracing.symbols import PRIMES, make_symbolic, symbolic_size

BATCH, HEIGHT, WIDTH = PRIMES["batch"], PRIMES["latent_height"], PRIMES["latent_width"]
INT64_MAX = 2**63 - 1
SIZES = [
    {"batch": 1, "latent_height": 4, "latent_width": 6},
    {"batch": 2, "latent_height": 5, "latent_width": 3},
]
LATENTS = TensorSpec("latents", "float32", ("batch", 2, "latent_height", "latent_width"), "BCHW")
PIXELS = TensorSpec("pixels", "float32", (1, 2, "8*latent_height", "8*latent_width"), "BCHW")


def constant(numbers: Sequence[int] | int, name: str) -> ir.Node:
    return ir.node("Constant", [], {"value": ir.tensor(np.array(numbers, np.int64))}, name=name)


def graph(spec: TensorSpec, nodes: list[ir.Node], value: ir.Value) -> ir.Model:
    """Put nodes around an input as a tracer would leave it."""
    value.shape = ir.Shape(spec.shape)
    result = nodes[-1].outputs[0]
    result.name, result.dtype = "result", ir.DataType.FLOAT
    return ir.Model(ir.Graph([value], [result], nodes=nodes, opset_imports={"": 20}, name="traced"), ir_version=10)


def traced(spec: TensorSpec) -> ir.Value:
    return ir.Value(name=spec.name, shape=ir.Shape(spec.resolve(PRIMES)), type=ir.TensorType(ir.DataType.FLOAT))


def reshaped(spec: TensorSpec, target: list[int]) -> ir.Model:
    value, shape = traced(spec), constant(target, "shape")
    return graph(spec, [shape, ir.node("Reshape", [value, shape.outputs[0]])], value)


def padded(spec: TensorSpec, paddings: list[int]) -> ir.Model:
    """Make a tensor as large as the input and more, and ask for its sizes."""
    value = traced(spec)
    shape = constant([size + more for size, more in zip(spec.resolve(PRIMES), paddings, strict=True)], "shape")
    made = ir.node("ConstantOfShape", [shape.outputs[0]])
    sizes = ir.node("Shape", [made.outputs[0]])
    return graph(spec, [shape, made, sizes, ir.node("Cast", [sizes.outputs[0]], {"to": ir.DataType.FLOAT})], value)


def run(model: ir.Model, spec: TensorSpec, sizes: dict[str, int]) -> NDArray[Any]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    text = ir.serde.serialize_model(model).SerializeToString()
    session = onnxruntime.InferenceSession(text, options, providers=["CPUExecutionProvider"])
    shape = spec.resolve(sizes)
    array = np.arange(math.prod(shape), dtype=np.float32).reshape(shape)
    result: NDArray[Any] = session.run(None, {spec.name: array})[0]
    return result


def ops(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


@pytest.mark.parametrize("sizes", SIZES)
def test_a_reshape_follows_its_input(sizes: dict[str, int]) -> None:
    model = reshaped(LATENTS, [BATCH, 2, HEIGHT * WIDTH])
    make_symbolic(model, (LATENTS,))
    batch, height, width = sizes.values()
    assert run(model, LATENTS, sizes).shape == (batch, 2, height * width)


@pytest.mark.parametrize("sizes", SIZES)
def test_a_product_of_all_symbols_and_a_factor_is_computed(sizes: dict[str, int]) -> None:
    model = reshaped(LATENTS, [2 * BATCH * HEIGHT * WIDTH])
    make_symbolic(model, (LATENTS,))
    assert run(model, LATENTS, sizes).shape == (2 * math.prod(sizes.values()),)


@pytest.mark.parametrize("sizes", SIZES)
def test_padding_is_added_to_the_symbol(sizes: dict[str, int]) -> None:
    model = padded(LATENTS, [0, 5, 1, 2])
    make_symbolic(model, (LATENTS,))
    batch, height, width = sizes.values()
    assert run(model, LATENTS, sizes).tolist() == [batch, 7, height + 1, width + 2]


@pytest.mark.parametrize("sizes", SIZES)
def test_latent_sizes_come_from_an_input_that_is_a_multiple_of_them(sizes: dict[str, int]) -> None:
    model = reshaped(PIXELS, [2, HEIGHT, 8, WIDTH, 8])
    make_symbolic(model, (PIXELS,))
    _, height, width = sizes.values()
    assert run(model, PIXELS, sizes).shape == (2, height, 8, width, 8)


@pytest.mark.parametrize("sizes", SIZES)
def test_a_multiple_and_padding_go_together(sizes: dict[str, int]) -> None:
    model = padded(PIXELS, [0, 0, 1, 2])
    make_symbolic(model, (PIXELS,))
    _, height, width = sizes.values()
    assert run(model, PIXELS, sizes).tolist() == [1, 2, 8 * height + 1, 8 * width + 2]


@pytest.mark.parametrize("attribute", ["value", "value_int"])
@pytest.mark.parametrize("sizes", SIZES)
def test_a_scalar_stays_a_scalar(sizes: dict[str, int], attribute: str) -> None:
    value = traced(LATENTS)
    holds: ir.TensorProtocol | int = HEIGHT if attribute == "value_int" else ir.tensor(np.array(HEIGHT, np.int64))
    start, limit, step = constant(0, "start"), ir.node("Constant", [], {attribute: holds}), constant(1, "step")
    counted = ir.node("Range", [node.outputs[0] for node in (start, limit, step)])
    cast = ir.node("Cast", [counted.outputs[0]], {"to": ir.DataType.FLOAT})
    model = graph(LATENTS, [start, limit, step, counted, cast], value)
    make_symbolic(model, (LATENTS,))
    assert run(model, LATENTS, sizes).tolist() == list(range(sizes["latent_height"]))


@pytest.mark.parametrize("sizes", SIZES)
def test_integers_in_an_attribute_list_are_found(sizes: dict[str, int]) -> None:
    value, shape = traced(LATENTS), ir.node("Constant", [], {"value_ints": [BATCH, -1]})
    model = graph(LATENTS, [shape, ir.node("Reshape", [value, shape.outputs[0]])], value)
    make_symbolic(model, (LATENTS,))
    batch, height, width = sizes.values()
    assert run(model, LATENTS, sizes).shape == (batch, 2 * height * width)


@pytest.mark.parametrize("sizes", SIZES)
def test_a_graph_left_as_traced_runs_at_no_other_size(sizes: dict[str, int]) -> None:
    model = reshaped(LATENTS, [BATCH, 2, HEIGHT * WIDTH])
    with pytest.raises(Exception, match="Reshape"):
        run(model, LATENTS, sizes)


def test_a_wrong_factor_makes_another_result() -> None:
    """The twin: what the tests above compare does tell formulas apart."""
    model = padded(LATENTS, [0, 5, 1, HEIGHT])
    make_symbolic(model, (LATENTS,))
    assert run(model, LATENTS, SIZES[0]).tolist() != [1, 7, 5, 6]


def test_equal_constants_share_their_formula() -> None:
    value = traced(LATENTS)
    first, second = constant([BATCH, -1], "first"), constant([BATCH, -1], "second")
    once = ir.node("Reshape", [value, first.outputs[0]])
    twice = ir.node("Reshape", [once.outputs[0], second.outputs[0]])
    model = graph(LATENTS, [first, second, once, twice], value)
    make_symbolic(model, (LATENTS,))
    assert ops(model).count("Mul") == ops(model).count("Add") == 1
    assert once.inputs[1] is twice.inputs[1]
    assert run(model, LATENTS, SIZES[1]).shape == (2, 2 * 5 * 3)


@pytest.mark.parametrize("numbers", [[0, -1, 2], [INT64_MAX], [-HEIGHT], [HEIGHT - 1]])
def test_a_constant_without_a_symbol_is_left_alone(numbers: list[int]) -> None:
    value, plain = traced(LATENTS), constant(numbers, "plain")
    cast = ir.node("Cast", [plain.outputs[0]], {"to": ir.DataType.FLOAT})
    model = graph(LATENTS, [plain, cast], value)
    make_symbolic(model, (LATENTS,))
    assert cast.inputs[0] is plain.outputs[0]


def test_a_float_that_equals_a_size_is_left_alone() -> None:
    value, plain = traced(LATENTS), ir.node("Constant", [], {"value": ir.tensor(np.array([float(HEIGHT)]))})
    cast = ir.node("Cast", [plain.outputs[0]], {"to": ir.DataType.FLOAT})
    model = graph(LATENTS, [plain, cast], value)
    make_symbolic(model, (LATENTS,))
    assert cast.inputs[0] is plain.outputs[0]


def test_shapes_between_nodes_get_their_symbols() -> None:
    model = reshaped(PIXELS, [2, HEIGHT, 8, WIDTH, 8])
    model.graph[-1].outputs[0].shape = ir.Shape([2, 8 * HEIGHT + 1, HEIGHT * WIDTH])
    make_symbolic(model, (PIXELS,))
    shape = model.graph[-1].outputs[0].shape
    assert shape is not None
    assert [str(size) for size in shape] == ["2", "8*latent_height+1", "latent_height*latent_width"]


@given(factor=st.integers(1, 1000), names=st.sets(st.sampled_from(list(PRIMES))), padding=st.integers(0, 2))
def test_a_formula_has_the_value_it_stands_for(factor: int, names: set[str], padding: int) -> None:
    size = factor * math.prod(PRIMES[name] for name in names) + padding
    formula = symbolic_size(size, PRIMES)
    if names:
        assert isinstance(formula, str)
        assert eval(formula, dict(PRIMES)) == size
        assert set(formula.replace("*", " ").replace("+", " ").split()) - set(PRIMES) <= {str(factor), str(padding)}
    else:
        assert formula == size


@given(st.integers(-INT64_MAX, HEIGHT - 1))
def test_sizes_below_the_primes_have_no_symbol(size: int) -> None:
    assert symbolic_size(size, PRIMES) == size


def test_no_small_multiple_of_one_prime_is_near_one_of_another() -> None:
    multiples = {name: {factor * prime for factor in range(1, 65)} for name, prime in PRIMES.items()}
    near = [
        (one, other, size)
        for one, sizes in multiples.items()
        for other in multiples
        if one != other
        for size in sizes
        if any(size + padding in multiples[other] for padding in range(-2, 3))
    ]
    assert near == []
