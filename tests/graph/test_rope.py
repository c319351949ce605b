"""Rotating the whole sequence by tables that leave text alone is rotating its video tokens, to the bit."""

import numpy as np
import onnx_ir as ir
import pytest
import torch
from diffusers.models.embeddings import apply_rotary_emb

from cvx_deploy.graph.fold import fold_indices
from cvx_deploy.graph.rope import rope_on_all_tokens
from tests.graph.compare import op_types, run, traced

TEXT, VIDEO, WIDTH = 3, 5, 8


class Rotate(torch.nn.Module):
    """What CogVideoX's attention processor does to Q."""

    cos: torch.Tensor
    sin: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        angles = torch.linspace(0, 3, VIDEO * WIDTH // 2).reshape(VIDEO, WIDTH // 2).repeat_interleave(2, 1)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def rotated(self, x: torch.Tensor) -> torch.Tensor:
        return apply_rotary_emb(x, (self.cos, self.sin))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * 1
        x[:, :, TEXT:] = self.rotated(x[:, :, TEXT:])
        return x


class RotateAnother(Rotate):
    """Rotates what is not the tensor that is written to."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * 1
        x[:, :, TEXT:] = self.rotated((x * 2)[:, :, TEXT:])
        return x


class RotateBackwards(Rotate):
    """Turns the pairs the other way."""

    def rotated(self, x: torch.Tensor) -> torch.Tensor:
        first, second = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
        turned = torch.stack([second, -first], dim=-1).flatten(3)
        return (x.float() * self.cos[None, None] + turned.float() * self.sin[None, None]).to(x.dtype)


def sample(dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(2, 4, TEXT + VIDEO, WIDTH, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_it_is_the_same_to_the_bit_and_scatters_nothing(dtype: torch.dtype) -> None:
    x = sample(dtype)
    model = traced(Rotate(), x)
    fold_indices(model)
    before = run(model, x)
    assert rope_on_all_tokens(model) == 1
    assert not {"ScatterND", "Slice", "Transpose"} & set(op_types(model))
    assert np.array_equal(run(model, x), before)
    assert np.array_equal(before, Rotate()(x).numpy())


@pytest.mark.parametrize("module", [RotateAnother, RotateBackwards])
def test_what_only_looks_alike_is_left_alone(module: type[Rotate]) -> None:
    x = sample(torch.float32)
    model = traced(module(), x)
    fold_indices(model)
    before = run(model, x)
    assert rope_on_all_tokens(model) == 0
    assert np.array_equal(run(model, x), before)


def test_twin_a_wrong_sign_is_found() -> None:
    x = sample(torch.float32)
    model = traced(Rotate(), x)
    fold_indices(model)
    before = run(model, x)
    rope_on_all_tokens(model)
    signs = next(node for node in model.graph if node.name is not None and node.name.endswith("/signs"))
    wrong = signs.attributes["value"].as_tensor().numpy() * -1
    signs.attributes["value"] = ir.Attr("value", ir.AttributeType.TENSOR, ir.tensor(wrong))
    assert not np.allclose(run(model, x), before)
