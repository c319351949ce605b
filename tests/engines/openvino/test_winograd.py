"""Convolutions with half of the products are the same convolutions."""

from typing import Any

import numpy as np
import openvino
import pytest
from numpy.typing import NDArray
from openvino import opset13 as ops

from cvx_deploy.engines.openvino import winograd

Values = NDArray[np.float32]


@pytest.fixture(autouse=True)
def _small_pictures_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(winograd, "_LEAST_CELLS", 0)


def convolution(shape: tuple[int, ...], outputs: int, stride: int = 1, places: int = 3) -> openvino.Model:
    """Return a network of one convolution over (N, C, H, W) or (N, C, T, H, W), as the VAE has them."""
    rng, axes = np.random.default_rng(0), len(shape) - 2
    kernel = rng.standard_normal((outputs, shape[1], *[places] * axes)).astype(np.float32)
    pads = [*[0] * (axes - 2), places // 2, places // 2]
    given = ops.parameter(list(shape), openvino.Type.f32)
    node = ops.convolution(given, ops.constant(kernel), [*[1] * (axes - 1), stride], pads, pads, [1] * axes)
    return openvino.Model([ops.relu(node)], [given], "one")


def run(model: openvino.Model) -> Values:
    compiled = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    values = np.random.default_rng(1).standard_normal(compiled.input(0).get_shape()).astype(np.float32)
    result: Any = compiled([values])[0]
    return np.array(result)


def error(found: Values, expected: Values) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize(
    "shape",
    [(1, 64, 4, 8, 6), (1, 96, 3, 10, 5), (3, 64, 12, 7), (1, 64, 5, 3)],
    ids=["frames", "height-of-no-fours", "pictures", "one-more-row"],
)
def test_the_result_is_the_convolutions(shape: tuple[int, ...]) -> None:
    expected = run(convolution(shape, 64))
    model = convolution(shape, 64)
    assert winograd.halve_products(model) == 1
    found = run(model)
    assert found.shape == expected.shape
    assert error(found, expected) < 1e-5


def test_the_products_are_half(monkeypatch: pytest.MonkeyPatch) -> None:
    model = convolution((1, 64, 4, 8, 6), 64)
    winograd.halve_products(model)
    kernels = [node.input_value(1).get_shape() for node in model.get_ops() if node.get_type_name() == "Convolution"]
    assert [list(kernel) for kernel in kernels] == [[64, 64, 3, 1, 3]] * 6, "over a quarter of the rows, each"


def test_twin_another_matrix_is_another_result(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = winograd._KERNEL.copy()
    wrong[3, 1] = 1 / 11
    monkeypatch.setattr(winograd, "_KERNEL", wrong)
    model = convolution((1, 64, 4, 8, 6), 64)
    winograd.halve_products(model)
    assert error(run(model), run(convolution((1, 64, 4, 8, 6), 64))) > 1e-3


@pytest.mark.parametrize(
    "model",
    [
        convolution((1, 64, 4, 8, 6), 32),
        convolution((1, 16, 4, 8, 6), 64),
        convolution((1, 64, 4, 8, 6), 64, stride=2),
        convolution((1, 64, 4, 8, 6), 64, places=1),
    ],
    ids=["few-outputs", "few-inputs", "strided", "one-place"],
)
def test_what_gains_nothing_stays(model: openvino.Model) -> None:
    assert winograd.halve_products(model) == 0


def test_an_output_keeps_its_name() -> None:
    given = ops.parameter([1, 64, 8, 6], openvino.Type.f32)
    node = ops.convolution(given, ops.constant(np.ones((64, 64, 3, 3), np.float32)), [1, 1], [1, 1], [1, 1], [1, 1])
    node.output(0).set_names({"frames"})
    model = openvino.Model([node], [given], "one")
    assert winograd.halve_products(model) == 1
    assert openvino.Core().compile_model(model, "CPU").output("frames").get_shape() == openvino.Shape([1, 64, 8, 6])


def test_a_small_picture_is_not_worth_larger_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(winograd, "_LEAST_CELLS", 2 * 8 * 6)
    assert winograd.halve_products(convolution((1, 64, 4, 8, 6), 64)) == 1
    assert winograd.halve_products(convolution((1, 64, 3, 8, 6), 64)) == 0
