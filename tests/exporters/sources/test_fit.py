"""Components that do not fit each other are refused by their configs alone, with the two numbers that must agree."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel

from cvx_deploy.errors import CheckpointError
from cvx_deploy.exporters.sources.checkpoint import Checkpoint
from cvx_deploy.exporters.sources.fit import check_fit
from tests.conftest import Tiny

I2V = "CogVideoXImageToVideoPipeline"


@pytest.fixture
def folder(tiny: Tiny, tmp_path: Path) -> Callable[[str], Path]:
    """Return a copy of a model's checkpoint that a test may change."""
    return lambda name: Path(shutil.copytree(tiny(name), tmp_path / "checkpoint"))


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_every_models_components_fit(tiny: Tiny, model_name: str) -> None:
    check_fit(Checkpoint(tiny(model_name)))


UNFIT: list[tuple[str, str, dict[str, Any], str]] = [
    ("5b", "text_encoder", {"d_model": 48}, r"text_embed_dim .* is \d+, and must be d_model .*, which is 48"),
    ("5b", "transformer", {"in_channels": 32}, r"\(text-to-video\) is 32, and must be latent_channels .* which is 16"),
    ("5b-i2v", "transformer", {"in_channels": 16}, r"\(image-to-video\) is 16, and must be twice .*, which is 32"),
    ("5b", "transformer", {"out_channels": 17}, "out_channels of the transformer is 17, and must be .*, which is 16"),
    ("5b", "vae", {"latent_channels": 8}, r"in_channels of .* is 16, and must be latent_channels .*, which is 8"),
    ("5b", "vae", {"out_channels": 4}, "out_channels of the VAE is 4, and must be .* a picture, which is 3"),
    ("5b", "vae", {"in_channels": 1}, "in_channels of the VAE is 1, and must be .* a picture, which is 3"),
    ("5b", "vae", {"temporal_compression_ratio": 16}, "ratio of the VAE is 16, and its 4 block_out_channels give 8"),
    ("5b", "vae", {"temporal_compression_ratio": 6}, "ratio of the VAE is 6, and its 4 block_out_channels give 4"),
    ("5b", "vae", {"down_block_types": ["CogVideoXDownBlock3D"]}, "down_block_types of the VAE must be as many"),
    ("5b", "vae", {"norm_num_groups": 7}, "no network can be built from .*vae/config.json: num_channels"),
    ("5b", "transformer", {"attention_head_dim": 24}, "attention_head_dim .* is 24; rotary positions split .* 16"),
    ("2b", "transformer", {"attention_head_dim": 12, "num_attention_heads": 2}, "is 24; sin-cos positions split"),
    ("2b", "transformer", {"patch_size_t": 2}, "patch_size_t of the transformer is 2, which goes with rotary"),
    ("5b-i2v", "transformer", {"patch_size_t": 2}, "patch_size_t of the transformer is 2, which goes with rotary"),
    ("2b", "transformer", {"use_learned_positional_embeddings": True}, "needs use_rotary_positional_embeddings"),
    ("5b", "transformer", {"ofs_embed_dim": 64}, "ofs_embed_dim .* is 64, which diffusers feeds to image-to-video"),
]


@pytest.mark.parametrize(("model", "component", "changes", "what"), UNFIT, ids=lambda value: str(value)[:40])
def test_what_does_not_fit_is_named_with_both_numbers(
    folder: Callable[[str], Path], model: str, component: str, changes: dict[str, Any], what: str
) -> None:
    root = folder(model)
    edit(root / component / "config.json", **changes)
    with pytest.raises(CheckpointError, match=what) as failure:
        check_fit(Checkpoint(root))
    assert "\n" not in str(failure.value)


def test_a_pipeline_of_the_other_task_is_refused(folder: Callable[[str], Path]) -> None:
    root = folder("5b")
    edit(root / "model_index.json", _class_name=I2V)
    with pytest.raises(CheckpointError, match=r"\(image-to-video\) is 16, and must be twice .*, which is 32"):
        check_fit(Checkpoint(root))


@pytest.mark.parametrize("width", [8, 16, 24, 32, 40, 48, 64])
def test_rotary_positions_are_refused_at_the_head_sizes_diffusers_cannot_split(
    folder: Callable[[str], Path], width: int
) -> None:
    from diffusers.models.embeddings import get_3d_rotary_pos_embed

    root = folder("5b")
    edit(root / "transformer/config.json", attention_head_dim=width)
    try:
        cos, _ = get_3d_rotary_pos_embed(width, ((0, 0), (4, 4)), (4, 4), 2)
        theirs = cos.shape[1] == width
    except (AssertionError, ValueError):
        theirs = False
    assert fits(root) == theirs


@pytest.mark.parametrize(("heads", "width"), [(1, 8), (2, 8), (3, 8), (1, 16), (3, 12), (4, 12), (1, 40)])
def test_sincos_positions_are_refused_at_the_widths_diffusers_cannot_split(
    folder: Callable[[str], Path], heads: int, width: int
) -> None:
    root = folder("2b")
    changes = {"attention_head_dim": width, "num_attention_heads": heads, "num_layers": 1}
    edit(root / "transformer/config.json", **changes)
    config = json.loads((root / "transformer/config.json").read_text())
    try:
        CogVideoXTransformer3DModel.from_config(config)
        theirs = True
    except ValueError:
        theirs = False
    assert fits(root) == theirs


@pytest.mark.parametrize("ratio", [1, 2, 4, 8, 16, 3])
def test_a_vae_is_refused_whose_blocks_do_not_give_its_ratio(folder: Callable[[str], Path], ratio: int) -> None:
    root = folder("5b")
    edit(root / "vae/config.json", temporal_compression_ratio=ratio)
    config = json.loads((root / "vae/config.json").read_text())
    with torch.device("meta"), torch.no_grad():
        vae = AutoencoderKLCogVideoX.from_config(config)
        moments, _ = vae.encoder(torch.zeros(1, 3, 16, 32, 32))
    assert fits(root) == (moments.shape[2] * ratio == 16)


def fits(root: Path) -> bool:
    try:
        check_fit(Checkpoint(root))
    except CheckpointError:
        return False
    return True
