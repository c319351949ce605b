"""A lean layer norm of a half type is the layer norm it stands for."""

import numpy as np
import pytest
import torch

from cvx_deploy.graph.layer_norm import lean_layer_norms
from tests.graph.compare import op_types, run, traced
from tests.tolerances import HALF_ROUNDING

WIDTH = 64


class Norm(torch.nn.Module):
    """A norm with work after it."""

    def __init__(self, affine: bool = True) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(WIDTH, elementwise_affine=affine)
        if affine:
            generator = torch.Generator().manual_seed(1)
            self.norm.weight = torch.nn.Parameter(1 + torch.randn(WIDTH, generator=generator) / 4)
            self.norm.bias = torch.nn.Parameter(torch.randn(WIDTH, generator=generator))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x) * 2


def sample(offset: float) -> torch.Tensor:
    return torch.randn(3, 5, WIDTH, generator=torch.Generator().manual_seed(0)) + offset


@pytest.mark.parametrize("offset", [0.0, 30.0])  # a mean far larger than the deviation loses nothing
@pytest.mark.parametrize("affine", [True, False])
def test_it_is_within_the_rounding_of_its_type(affine: bool, offset: float) -> None:
    module, x = Norm(affine).half(), sample(offset).half()
    model = traced(module, x)
    assert lean_layer_norms(model) == 1
    assert "LayerNormalization" not in op_types(model)
    exact = Norm(affine)
    exact.load_state_dict({name: value.float() for name, value in module.state_dict().items()})
    with torch.no_grad():
        expected = exact(x.float()).numpy()
    assert np.abs(run(model, x) - expected).max() / np.abs(expected).max() < HALF_ROUNDING


def test_norms_of_float32_keep_their_fused_kernel() -> None:
    x = sample(0)
    model = traced(Norm(), x)
    assert lean_layer_norms(model) == 0
    assert "LayerNormalization" in op_types(model)


def test_what_is_not_a_number_stays_that() -> None:
    module, x = Norm().half(), sample(0).half()
    x[0, 0, 3], x[1, 1, 5] = float("nan"), float("inf")
    model = traced(module, x)
    before = run(model, x)
    lean_layer_norms(model)
    found = run(model, x)
    assert np.array_equal(np.isnan(found), np.isnan(before))
    assert np.isnan(found).all(axis=-1).sum() == 2


def test_twin_a_norm_that_does_not_see_its_input_again_is_found() -> None:
    module, x = Norm().half(), sample(0).half()
    model = traced(module, x)
    before = run(model, x)
    lean_layer_norms(model)
    again = next(node for node in model.graph if node.op_type == "Where")
    again.replace_input_with(1, again.inputs[2])
    assert np.abs(run(model, x) - before).max() > 0.1
