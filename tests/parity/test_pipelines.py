"""Whole videos against diffusers' own pipelines: same weights, same seed, same pixels."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    CogVideoXImageToVideoPipeline,
    CogVideoXPipeline,
    CogVideoXVideoToVideoPipeline,
    DiffusionPipeline,
)
from numpy.typing import NDArray
from PIL import Image

from cvx_deploy.bundle.opened import Bundle
from cvx_deploy.engines.onnxruntime.backend import OrtBackend
from cvx_deploy.errors import CvxError, EngineError
from cvx_deploy.exporters.export import ExportRequest, bundle_from_checkpoint
from cvx_deploy.pipeline.request import RunRequest
from cvx_deploy.pipeline.run import run
from cvx_deploy.shape import Shape
from tests.conftest import Exported, Tiny
from tests.parity.corrupt import corrupted
from tests.tolerances import PIXELS_ABSOLUTE, PIXELS_PSNR

Video = NDArray[np.float32]  # (frames, height, width, 3) in [0, 1]

PROMPT = "a red circle moves to the right"
SCHEDULERS = {"ddim": CogVideoXDDIMScheduler, "dpm": CogVideoXDPMScheduler}


def psnr(found: Video, expected: Video) -> float:
    """Return the peak signal-to-noise ratio in dB of pixels in [0, 1]."""
    return float(-10 * np.log10(np.mean((found - expected) ** 2) + 1e-20))


def assert_same(found: Video, expected: Video) -> None:
    """Hold a video against diffusers'."""
    assert found.shape == expected.shape
    assert expected.std() > 0.02, "a flat video would agree with anything"
    assert np.abs(found - expected).max() < PIXELS_ABSOLUTE
    assert psnr(found, expected) > PIXELS_PSNR


def ours(bundle: Bundle, folder: Path, **request: Any) -> Video:
    """Run a bundle and return what it wrote."""
    run(OrtBackend(bundle), RunRequest(output=folder / "out.npy", **{"prompts": (PROMPT,), "steps": 3, **request}))
    return np.load(folder / "out.npy")


def diffusers(
    pipeline: type[DiffusionPipeline], bundle: Bundle, checkpoint: Path, scheduler: str, seed: int, **call: Any
) -> Video:
    """Run diffusers' pipeline on the checkpoint the bundle was made from."""
    pipe = pipeline.from_pretrained(checkpoint, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = SCHEDULERS[scheduler].from_config(pipe.scheduler.config)
    if call.pop("tiling", False):
        pipe.vae.enable_tiling()
    shape = bundle.shape
    if pipeline is not CogVideoXVideoToVideoPipeline:
        call["num_frames"] = shape.frames
    arguments = {"prompt": PROMPT, "num_inference_steps": 3, "guidance_scale": 6.0, **call}
    return pipe(
        **arguments,
        height=shape.height,
        width=shape.width,
        generator=torch.Generator().manual_seed(seed),
        output_type="np",
    ).frames[0]


def gradient(seed: int) -> Image.Image:
    """Return a smooth colour picture, of another size than any bundle's."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 255, (4, 5, 3), np.uint8))
    return small.resize((150, 90), Image.Resampling.BICUBIC)


@pytest.mark.parametrize(
    ("name", "shape", "scheduler", "call"),
    [
        ("2b", {}, "ddim", {}),
        ("2b", {}, "dpm", {"guidance_scale": 1.0}),
        ("5b", {}, "dpm", {"negative_prompt": "a blue square"}),
        ("5b", {}, "ddim", {"use_dynamic_cfg": True}),
        ("5b", {"height": 160, "width": 48}, "dpm", {}),
        ("1.5-5b", {}, "dpm", {}),  # 5 latent frames, padded to 6
        ("1.5-5b", {}, "ddim", {"guidance_scale": 1.0}),
    ],
)
def test_text_to_video_matches_diffusers(
    name: str,
    shape: dict[str, int],
    scheduler: str,
    call: dict[str, Any],
    tiny: Tiny,
    exported: Exported,
    tmp_path: Path,
) -> None:
    bundle = exported(name, **shape)
    expected = diffusers(CogVideoXPipeline, bundle, tiny(name), scheduler, 7, **call)
    request = {"dynamic_cfg" if key == "use_dynamic_cfg" else key: value for key, value in call.items()}
    assert_same(ours(bundle, tmp_path, scheduler=scheduler, seed=7, **request), expected)


@pytest.mark.parametrize(
    ("name", "scheduler", "guidance"), [("5b-i2v", "dpm", 6.0), ("5b-i2v", "ddim", 1.0), ("1.5-5b-i2v", "dpm", 6.0)]
)
def test_image_to_video_matches_diffusers(
    name: str, scheduler: str, guidance: float, tiny: Tiny, exported: Exported, tmp_path: Path
) -> None:
    bundle = exported(name)
    gradient(1).save(tmp_path / "image.png")
    expected = diffusers(
        CogVideoXImageToVideoPipeline, bundle, tiny(name), scheduler, 3, image=gradient(1), guidance_scale=guidance
    )
    found = ours(bundle, tmp_path, scheduler=scheduler, seed=3, image=tmp_path / "image.png", guidance_scale=guidance)
    assert_same(found, expected)


@pytest.mark.parametrize(
    ("name", "shape", "scheduler", "strength"),
    [
        ("2b", {}, "ddim", 0.8),
        ("5b", {}, "dpm", 0.5),
        pytest.param("1.5-5b", {"frames": 16}, "dpm", 1.0, marks=pytest.mark.nightly),
    ],
)
def test_video_to_video_matches_diffusers(
    name: str,
    shape: dict[str, int],
    scheduler: str,
    strength: float,
    tiny: Tiny,
    exported: Exported,
    tmp_path: Path,
) -> None:
    bundle = exported(name, **shape)
    frames = [gradient(seed) for seed in range(bundle.shape.frames)]
    (tmp_path / "clip").mkdir()
    for index, frame in enumerate(frames):
        frame.save(tmp_path / "clip" / f"{index}.png")
    expected = diffusers(
        CogVideoXVideoToVideoPipeline,
        bundle,
        tiny(name),
        scheduler,
        11,
        video=frames,
        strength=strength,
        num_inference_steps=5,
    )
    found = ours(bundle, tmp_path, scheduler=scheduler, seed=11, video=tmp_path / "clip", strength=strength, steps=5)
    assert_same(found, expected)


def with_ratio(checkpoint: Path, folder: Path, ratio: int) -> Path:
    """Return a copy of a checkpoint whose VAE makes fewer or more video frames of a latent one; its weights fit all."""
    shutil.copytree(checkpoint, folder)
    config = folder / "vae" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"temporal_compression_ratio": ratio}))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ratio", "frames"), [(8, 17), *(pytest.param(2, frames, marks=pytest.mark.nightly) for frames in (13, 20))]
)
def test_video_to_video_matches_diffusers_at_another_ratio_of_the_vae(
    ratio: int, frames: int, tiny: Tiny, tmp_path: Path
) -> None:
    folder = with_ratio(tiny("2b"), tmp_path / "checkpoint", ratio)
    request = ExportRequest("mine", folder, frames=frames, height=48, width=48)
    bundle = bundle_from_checkpoint(request, tmp_path / "bundle")
    pictures = [gradient(seed) for seed in range(frames)]
    (tmp_path / "clip").mkdir()
    for index, frame in enumerate(pictures):
        frame.save(tmp_path / "clip" / f"{index}.png")
    call = {"strength": 0.5, "num_inference_steps": 4, "video": pictures}
    expected = diffusers(CogVideoXVideoToVideoPipeline, bundle, folder, "ddim", 11, **call)
    assert_same(ours(bundle, tmp_path, seed=11, video=tmp_path / "clip", strength=0.5, steps=4), expected)


TWO_SHAPES = [
    ("2b", (Shape(9, 48, 176), Shape(8, 80, 64))),
    ("1.5-5b", (Shape(16, 48, 80), Shape(25, 80, 64))),
]


@pytest.mark.parametrize(("name", "shapes"), [TWO_SHAPES[0], pytest.param(*TWO_SHAPES[1], marks=pytest.mark.nightly)])
def test_every_shape_of_a_bundle_matches_diffusers(
    name: str, shapes: tuple[Shape, ...], tiny: Tiny, exported: Exported, tmp_path: Path
) -> None:
    bundle = exported(name, shapes=shapes)
    for shape in shapes:
        view = bundle.at(shape)
        expected = diffusers(CogVideoXPipeline, view, tiny(name), "ddim", 9)
        assert_same(ours(view, tmp_path, scheduler="ddim", seed=9), expected)


def test_the_transformer_of_another_shape_cannot_pass_for_the_right_one(exported: Exported, tmp_path: Path) -> None:
    bundle = exported("2b", shapes=TWO_SHAPES[0][1])
    first, second = bundle.manifest.shapes
    swapped = replace(first, networks={**first.networks, "transformer": second.networks["transformer"]})
    wrong = replace(bundle, manifest=replace(bundle.manifest, shapes=(swapped, second)))
    with pytest.raises(EngineError, match="invalid dimensions"):
        ours(wrong, tmp_path)


def test_tiled_decoding_matches_diffusers_in_a_whole_video(tiny: Tiny, exported: Exported, tmp_path: Path) -> None:
    bundle = exported("5b-i2v")
    gradient(2).save(tmp_path / "image.png")
    expected = diffusers(
        CogVideoXImageToVideoPipeline, bundle, tiny("5b-i2v"), "dpm", 5, image=gradient(2), tiling=True
    )
    found = ours(bundle, tmp_path, seed=5, image=tmp_path / "image.png", vae_tiling=True)
    assert_same(found, expected)


def test_every_video_of_a_run_is_the_video_of_its_own_seed(tiny: Tiny, exported: Exported, tmp_path: Path) -> None:
    bundle = exported("5b")
    prompts = (PROMPT, "a small green square grows")
    found = ours(bundle, tmp_path, prompts=prompts, num_videos=2, seed=20)
    assert len(found) == 4
    for index in (0, 3):
        expected = diffusers(CogVideoXPipeline, bundle, tiny("5b"), "dpm", 20 + index, prompt=prompts[index // 2])
        assert_same(found[index], expected)


def test_kept_latents_decode_to_the_same_video(exported: Exported, tmp_path: Path) -> None:
    bundle = exported("1.5-5b")
    first = ours(bundle, tmp_path, seed=1, save_latents=tmp_path / "kept.npy")
    output = tmp_path / "again.npy"
    run(OrtBackend(bundle), RunRequest((), output, from_latents=tmp_path / "kept.npy"))
    again = np.load(output).reshape(first.shape)
    np.testing.assert_array_equal(first, again)


@pytest.mark.parametrize(
    ("component", "tensor"),
    [
        ("text_encoder", "encoder.block.0.layer.0.SelfAttention.v.weight"),
        ("transformer", "transformer_blocks.0.ff.net.2.weight"),
        ("vae", "decoder.conv_out.conv.weight"),
    ],
)
def test_a_corrupted_weight_shows_in_the_video(component: str, tensor: str, exported: Exported, tmp_path: Path) -> None:
    bundle = exported("5b")
    whole = ours(bundle, tmp_path, seed=7)
    broken = ours(corrupted(bundle, component, tensor, tmp_path), tmp_path, seed=7)
    with pytest.raises(AssertionError):
        assert_same(broken, whole)


def test_another_seed_is_another_video(exported: Exported, tmp_path: Path) -> None:
    bundle = exported("5b")
    with pytest.raises(AssertionError):
        assert_same(ours(bundle, tmp_path, seed=8), ours(bundle, tmp_path, seed=7))


def test_one_and_a_half_refuses_video_to_video_at_an_odd_latent_count(exported: Exported, tmp_path: Path) -> None:
    with pytest.raises(CvxError, match="even number of latent frames"):
        ours(exported("1.5-5b"), tmp_path, video=tmp_path)
