"""Text and video worked on as one sequence give what they gave apart, to the bit."""

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest
import torch

from cvx_deploy.graph.fold import fold_indices
from cvx_deploy.graph.joint import join_text_and_video
from cvx_deploy.graph.split import split_without_sequences
from tests.graph.compare import op_types, run, traced

TEXT, VIDEO, WIDTH = 3, 5, 16
Part = torch.Tensor


class Block(torch.nn.Module):
    """Two norms with modulation and a gated residual, text and video apart, as in diffusers' block."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(WIDTH)
        self.norm.bias = torch.nn.Parameter(torch.randn(WIDTH, generator=torch.Generator().manual_seed(1)))

    def rows(self, rows: torch.Tensor, x: torch.Tensor) -> list[torch.Tensor]:
        """Return scale and gate of text, then of video."""
        return [row[None, None] for row in rows]

    def joined(self, text: Part, video: Part, rows: list[torch.Tensor]) -> torch.Tensor:
        return torch.cat([self.norm(text) * (1 + rows[0]), self.norm(video) * (1 + rows[2])], dim=1)

    def forward(self, x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        parts = self.rows(rows, x)
        text, video = x[:, :TEXT], x[:, TEXT:]
        inner = torch.tanh(self.joined(text, video, parts))
        text_added, video_added = inner.split([TEXT, VIDEO], dim=1)
        text, video = text + parts[1] * text_added, video + parts[3] * video_added
        return torch.tanh(self.joined(text, video, parts))[:, TEXT:] + video


class VideoFirst(Block):
    """Joins the parts in the other order."""

    def joined(self, text: Part, video: Part, rows: list[torch.Tensor]) -> torch.Tensor:
        return torch.cat([self.norm(video) * rows[2], self.norm(text) * rows[0]], dim=1)


class WorkedOnDifferently(Block):
    """Adds to one part what the other is multiplied with."""

    def joined(self, text: Part, video: Part, rows: list[torch.Tensor]) -> torch.Tensor:
        return torch.cat([self.norm(text) + rows[0], self.norm(video) * rows[2]], dim=1)


class RowsFromTokens(Block):
    """Takes its rows from the tokens."""

    def rows(self, rows: torch.Tensor, x: torch.Tensor) -> list[torch.Tensor]:
        return [row[None, None] * x[:, :TEXT].sum(dim=(0, 1), keepdim=True) for row in rows]


class RowOfEachToken(Block):
    """Multiplies every token of the text with a row of its own."""

    def rows(self, rows: torch.Tensor, x: torch.Tensor) -> list[torch.Tensor]:
        text, gate, video, video_gate = super().rows(rows, x)
        return [text.repeat(1, TEXT, 1), gate, video, video_gate]


def sample(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, TEXT + VIDEO, WIDTH, generator=generator)
    return x.to(dtype), torch.randn(4, WIDTH, generator=generator).to(dtype)


def graph_of(module: Callable[[], Block], dtype: torch.dtype = torch.float16) -> ir.Model:
    model = traced(module().to(dtype), *sample(dtype))
    split_without_sequences(model)
    fold_indices(model)
    return model


def test_it_is_the_same_to_the_bit_with_one_norm_where_two_were() -> None:
    model, inputs = graph_of(Block), sample(torch.float16)
    before = run(model, *inputs)
    assert op_types(model).count("LayerNormalization") == 4
    assert join_text_and_video(model) == 2
    found = op_types(model)
    assert found.count("LayerNormalization") == 2
    assert "Split" not in found
    assert not any(node.op_type == "Concat" and node.attributes.get_int("axis", 0) == 1 for node in model.graph)
    assert np.array_equal(run(model, *inputs), before)


@pytest.mark.parametrize("module", [VideoFirst, WorkedOnDifferently, RowsFromTokens, RowOfEachToken])
def test_what_only_looks_alike_is_left_alone(module: type[Block]) -> None:
    model, inputs = graph_of(module), sample(torch.float16)
    before = run(model, *inputs)
    assert join_text_and_video(model) == 0
    assert np.array_equal(run(model, *inputs), before)


def test_networks_of_float32_are_left_alone() -> None:
    assert join_text_and_video(graph_of(Block, torch.float32)) == 0


def test_twin_rows_of_the_wrong_part_are_found() -> None:
    model, inputs = graph_of(Block), sample(torch.float16)
    before = run(model, *inputs)
    join_text_and_video(model)
    rows = next(node for node in model.graph if node.op_type == "Where")
    rows.replace_input_with(1, rows.inputs[2])
    assert not np.allclose(run(model, *inputs), before)
