"""What training leaves becomes a checkpoint that diffusers loads and runs as any other."""

import json
from pathlib import Path

import assemble
import numpy as np
import package
import pytest
import score
import torch
import train_transformer
import train_vae
import world
from text import load_tokenizer
from training import Run
from transformers import T5Tokenizer

SMALL = train_transformer.Size(heads=2, head_dim=16, layers=1, time_embed_dim=8, text_width=16, text_layers=1)


def _untrained(network: torch.nn.Module, state: Path) -> None:
    Run(network, torch.optim.AdamW(network.parameters()), state).save()


@pytest.fixture(scope="module", params=["text-to-video", "image-to-video"])
def checkpoint(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path
) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    _untrained(train_vae.new_vae(), folder / "vae-state")
    vocabulary = len(load_tokenizer(tokenizer_folder))
    _untrained(train_transformer.TextToLatents(request.param, SMALL, vocabulary), folder / "state")
    parts = assemble.Parts(folder / "vae-state", folder / "state", folder, tokenizer_folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assemble, "psnr", lambda vae, count: 12.34)
        assemble.assemble(request.param, parts, 0.5, folder / "out", SMALL)
    return folder / "out"


def test_checkpoint_has_the_published_layout(checkpoint: Path) -> None:
    index = json.loads((checkpoint / "model_index.json").read_text())
    assert {"tokenizer", "text_encoder", "transformer", "vae", "scheduler"} <= set(index)
    for name in ("transformer", "vae"):
        assert (checkpoint / name / "diffusion_pytorch_model.safetensors").exists()
    assert (checkpoint / "tokenizer" / "spiece.model").exists()
    assert "held-out clips 12.34 dB" in (checkpoint / "README.md").read_text()
    scheduler = json.loads((checkpoint / "scheduler" / "scheduler_config.json").read_text())
    assert (scheduler["prediction_type"], scheduler["rescale_betas_zero_snr"]) == ("v_prediction", True)
    assert json.loads((checkpoint / "vae" / "config.json").read_text())["scaling_factor"] == 0.5


def test_checkpoint_fits_into_12_megabytes_at_full_size(checkpoint: Path) -> None:
    small = sum(p.numel() for p in train_transformer.TextToLatents("text-to-video", SMALL, 115).parameters())
    full = sum(
        p.numel() for p in train_transformer.TextToLatents("text-to-video", train_transformer.Size(), 115).parameters()
    )
    size = sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file())
    assert size + 2 * (full - small) + 500_000 < 12_000_000


def test_pipelines_make_the_same_video_twice_from_defaults(checkpoint: Path) -> None:
    captions = ["a red circle moves to the right", "a blue square grows"]
    config = json.loads((checkpoint / "transformer" / "config.json").read_text())
    images = np.full((2, 48, 48, 3), 0.5, np.float32) if config["in_channels"] == 16 else None
    sampling = score.Sampling(steps=2)
    first, again = (score.videos_from_diffusers(checkpoint, captions, images, sampling) for _ in range(2))
    assert first.shape == (2, 9, 48, 48, 3)
    assert np.isfinite(first).all()
    assert np.array_equal(first, again)


def test_default_size_of_the_pipelines_is_the_trained_one(checkpoint: Path) -> None:
    transformer = json.loads((checkpoint / "transformer" / "config.json").read_text())
    vae = json.loads((checkpoint / "vae" / "config.json").read_text())
    # What CogVideoXPipeline falls back on when no height, width or number of frames is given.
    spatial = 2 ** (len(vae["block_out_channels"]) - 1)
    shape = (
        transformer["sample_frames"],
        transformer["sample_height"] * spatial,
        transformer["sample_width"] * spatial,
    )
    assert shape == (world.FRAMES, world.SIDE, world.SIDE)


def test_tokenizer_survives_the_checkpoint(checkpoint: Path, tokenizer_folder: Path) -> None:
    before, after = (T5Tokenizer.from_pretrained(path) for path in (tokenizer_folder, checkpoint / "tokenizer"))
    for text in ("a large violet disc that drifts leftwards", "", "A penguin, 42!"):
        assert before(text).input_ids == after(text).input_ids
    assert after("")["input_ids"] == [1]


@pytest.mark.export
def test_the_packaged_folder_runs_wherever_it_is_and_makes_the_videos_of_diffusers(
    checkpoint: Path, tmp_path: Path
) -> None:
    """The twin is the next seed's video, which is another one."""
    package.package(checkpoint, "mini", tmp_path / "packaged")
    moved = (tmp_path / "packaged").rename(tmp_path / "moved")
    captions = ["a red circle moves to the right", "a blue square grows"]
    images = np.full((2, 48, 48, 3), 0.4, np.float32) if score.takes_images(checkpoint) else None
    assert score.takes_images(moved) == score.takes_images(checkpoint)
    sampling = score.Sampling(steps=2)
    packaged = score.videos_from_bundle(moved, captions, images, sampling)
    reference = score.videos_from_diffusers(moved, captions, images, sampling)
    assert np.abs(packaged - reference).max() < 1e-3
    assert np.abs(packaged - reference[::-1]).max() > 1e-2
