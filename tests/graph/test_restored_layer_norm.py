"""A layer norm that was spelled out is one operator again, of the same values."""

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from numpy.typing import NDArray
from onnx import numpy_helper

from cvx_deploy.bundle.opened import Bundle
from cvx_deploy.graph.layer_norm import lean_layer_norms
from cvx_deploy.graph.restored_layer_norm import restore_layer_norms
from cvx_deploy.miniatures import miniature
from tests.conftest import Exported
from tests.graph.compare import run, traced
from tests.graph.test_layer_norm import Norm, sample
from tests.tolerances import HALF_ROUNDING


def lean(affine: bool = True) -> onnx.ModelProto:
    model = traced(Norm(affine).half(), sample(0).half())
    assert lean_layer_norms(model) == 1
    return ir.to_proto(model)


def computed(model: onnx.ModelProto, x: torch.Tensor) -> NDArray[Any]:
    return run(ir.from_proto(model), x)


def operators(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node if node.op_type != "Constant"]


def difference(found: NDArray[Any], expected: NDArray[Any]) -> float:
    return float(np.abs(found.astype(np.float32) - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_a_restored_norm_gives_the_same(affine: bool, offset: float) -> None:
    model, x = lean(affine), sample(offset).half()
    expected = computed(model, x)
    assert restore_layer_norms(model) == 1
    assert operators(model).count("LayerNormalization") == 1
    assert not {"ReduceMean", "Sqrt", "Where"} & set(operators(model)), "nothing is left of what it was spelled out to"
    onnx.checker.check_model(model, full_check=True)
    assert difference(computed(model, x), expected) < HALF_ROUNDING


def test_twin_another_epsilon_is_found() -> None:
    model, x = lean(), sample(0).half()
    expected = computed(model, x)
    restore_layer_norms(model)
    norm = next(node for node in model.graph.node if node.op_type == "LayerNormalization")
    next(given for given in norm.attribute if given.name == "epsilon").f = 0.1
    assert difference(computed(model, x), expected) > HALF_ROUNDING


def other_axis(model: onnx.ModelProto) -> None:
    for node in model.graph.node:
        if node.op_type == "Constant" and node.attribute[0].t.data_type == onnx.TensorProto.INT64:
            node.attribute[0].t.CopyFrom(numpy_helper.from_array(np.array([-2])))


def other_values_again(model: onnx.ModelProto) -> None:
    where = next(node for node in model.graph.node if node.op_type == "Where")
    where.input[1] = where.input[2]


def other_condition(model: onnx.ModelProto) -> None:
    condition = next(node for node in model.graph.node if node.op_type == "GreaterOrEqual")
    condition.op_type = "LessOrEqual"


def variance_of_x(model: onnx.ModelProto) -> None:
    square = next(node for node in model.graph.node if node.op_type == "Mul" and node.input[0] == node.input[1])
    square.input[0] = square.input[1] = next(
        node.output[0] for node in model.graph.node if node.op_type == "Cast" and node.input[0] in ("x", "input")
    )


@pytest.mark.parametrize("change", [other_axis, other_values_again, other_condition, variance_of_x])
def test_what_is_no_layer_norm_is_left_alone(change: Any) -> None:
    model = lean()
    change(model)
    before = model.SerializeToString()
    assert restore_layer_norms(model) == 0
    assert model.SerializeToString() == before


def test_every_norm_of_a_transformer_is_restored_and_one_of_float32_has_none(exported: Exported) -> None:
    model = onnx.load(exported("5b", precision="bf16").onnx_path("transformer"), load_external_data=False)
    spelled_out = sum(node.op_type == "GreaterOrEqual" for node in model.graph.node)
    assert restore_layer_norms(model) == spelled_out > 0
    assert "GreaterOrEqual" not in operators(model)
    plain = onnx.load(Bundle.open(miniature("mini")).onnx_path("transformer"), load_external_data=False)
    assert restore_layer_norms(plain) == 0
