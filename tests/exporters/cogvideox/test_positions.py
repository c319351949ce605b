"""Learned positions are used where diffusers uses them, and its sin-cos table everywhere else."""

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel

from cvx_deploy.exporters.cogvideox.transformer import TransformerContract
from cvx_deploy.shape import Shape
from tests.conftest import Tiny


def config_of(checkpoint: Path, **changes: Any) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((checkpoint / "transformer" / "config.json").read_text())
    return config | {"num_layers": 1} | changes


def theirs(config: dict[str, Any], latents: tuple[int, int, int]) -> str:
    """Say which positions diffusers adds: those of the checkpoint, or ones that it computes in ``forward``."""
    embed: Any = CogVideoXTransformer3DModel.from_config(config).patch_embed
    frames, height, width = latents
    text = torch.zeros(1, config["max_text_seq_length"], config["text_embed_dim"])
    compute = embed._get_positional_embeddings
    with mock.patch.object(embed, "_get_positional_embeddings", side_effect=compute) as computed, torch.no_grad():
        embed(text, torch.zeros(1, frames, config["in_channels"], height, width))
    return "sincos" if computed.called else "learned"


@pytest.mark.parametrize("sample_frames", [5, 8, 9, 10, 11, 12, 13])
@pytest.mark.parametrize("frames", [8, 9, 16, 17])
@pytest.mark.parametrize("ratio", [2, 4])
def test_the_checkpoints_positions_are_used_where_diffusers_uses_them(
    tiny: Tiny, sample_frames: int, frames: int, ratio: int
) -> None:
    config = config_of(tiny("5b-i2v"), sample_frames=sample_frames, temporal_compression_ratio=ratio)
    contract = TransformerContract(config, "fp32", Shape(frames, 80, 112), spatial=8, temporal=4)
    assert contract.positions == theirs(config, contract.latent_shape)


def test_both_kinds_of_positions_are_met(tiny: Tiny) -> None:
    """The claim above would be empty if one kind were never used."""
    config = config_of(tiny("5b-i2v"))
    assert {theirs(config | {"sample_frames": frames}, (3, 10, 14)) for frames in (9, 10)} == {"learned", "sincos"}
