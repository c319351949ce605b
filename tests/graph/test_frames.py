"""Work on single frames of a chunk gives the same in place as turned, and is left alone where it is not that."""

import numpy as np
import onnx_ir as ir
import pytest
import torch

from cvx_deploy.graph.fold import fold_indices
from cvx_deploy.graph.frames import frames_in_place
from tests.graph.compare import op_types, run, traced
from tests.tolerances import HALF_ROUNDING

CHANNELS, FRAMES, SIDE = 3, 4, 6


class Upsampler(torch.nn.Module):
    """Upsamples every frame, then convolves it, as diffusers' ``CogVideoXUpsample3D``."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(CHANNELS, 5, 3, padding=1)
        generator = torch.Generator().manual_seed(1)
        for parameter in self.conv.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) / 4

    def turned(self, x: torch.Tensor) -> torch.Tensor:
        return x.permute(0, 2, 1, 3, 4).flatten(0, 1)

    def back(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(1, FRAMES, *x.shape[1:]).permute(0, 2, 1, 3, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.back(torch.nn.functional.interpolate(self.turned(torch.tanh(x)), scale_factor=2.0))
        return torch.tanh(self.back(self.conv(self.turned(x))))


class Downsampler(Upsampler):
    """Convolves with a stride what is padded at two sides."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        conv = self.conv
        padded = torch.nn.functional.pad(torch.tanh(x), (0, 1, 0, 1))
        return torch.tanh(self.back(torch.nn.functional.conv2d(self.turned(padded), conv.weight, conv.bias, stride=2)))


class Pooling(Upsampler):
    """Takes the mean of every two frames."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(x)
        pooled = torch.nn.functional.avg_pool1d(x.permute(0, 3, 4, 1, 2).reshape(-1, CHANNELS, FRAMES), 2, stride=2)
        return torch.tanh(pooled.reshape(1, SIDE, SIDE, CHANNELS, FRAMES // 2).permute(0, 3, 4, 1, 2))


class TurnedOtherwise(Upsampler):
    """Takes rows for frames."""

    def turned(self, x: torch.Tensor) -> torch.Tensor:
        return x.permute(0, 3, 1, 2, 4).flatten(0, 1)

    def back(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(1, -1, *x.shape[1:]).permute(0, 2, 3, 1, 4)


class WorkedOnTogether(Upsampler):
    """Adds to every frame what all have in common."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        turned = self.turned(torch.tanh(x))
        return torch.tanh(self.back(turned + turned.mean(dim=0, keepdim=True)))


def sample(dtype: torch.dtype) -> torch.Tensor:
    shape = (1, CHANNELS, FRAMES, SIDE, SIDE)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def graph_of(module: type[Upsampler], dtype: torch.dtype = torch.float16) -> ir.Model:
    model = traced(module().to(dtype), sample(dtype))
    fold_indices(model)
    return model


@pytest.mark.parametrize(("module", "places"), [(Upsampler, 2), (Downsampler, 1), (Pooling, 1)])
def test_it_is_the_same_within_a_rounding_and_turns_nothing(module: type[Upsampler], places: int) -> None:
    model, x = graph_of(module), sample(torch.float16)
    before = run(model, x)
    assert frames_in_place(model) == places
    assert not {"Transpose", "Reshape"} & set(op_types(model))
    assert np.abs(run(model, x) - before).max() < HALF_ROUNDING * np.abs(before).max()


@pytest.mark.parametrize("module", [TurnedOtherwise, WorkedOnTogether])
def test_what_only_looks_alike_is_left_alone(module: type[Upsampler]) -> None:
    model, x = graph_of(module), sample(torch.float16)
    before = run(model, x)
    assert frames_in_place(model) == 0
    assert np.array_equal(run(model, x), before)


def test_networks_of_float32_are_left_alone() -> None:
    assert frames_in_place(graph_of(Upsampler, torch.float32)) == 0


def test_twin_a_bias_that_is_lost_is_found() -> None:
    model, x = graph_of(Upsampler), sample(torch.float16)
    before = run(model, x)
    frames_in_place(model)
    conv = next(node for node in model.graph if node.op_type == "Conv" and str(node.name).endswith("/Frame"))
    conv.replace_input_with(2, None)
    assert np.abs(run(model, x) - before).max() > HALF_ROUNDING * np.abs(before).max()
