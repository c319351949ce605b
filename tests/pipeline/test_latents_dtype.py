"""Latents in half precision against torch and diffusers: the noise, each step, and whole pipelines."""

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
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from numpy.typing import NDArray
from PIL import Image

from cvx_deploy.bundle.opened import Bundle
from cvx_deploy.errors import CvxError
from cvx_deploy.families.cogvideox.models import SchedulerKind
from cvx_deploy.measure.difference import psnr
from cvx_deploy.pipeline.noise import Generator
from cvx_deploy.pipeline.pipeline import Pipeline
from cvx_deploy.pipeline.rounding import rounded
from cvx_deploy.pipeline.schedulers import Scheduler, SchedulerConfig, make_scheduler
from cvx_deploy.precision import Precision
from tests.command import cvx
from tests.conftest import Exported, Tiny
from tests.tolerances import PIXELS_PSNR, ROUNDED_OTHERWISE

HALVES: dict[Precision, torch.dtype] = {"fp16": torch.float16, "bf16": torch.bfloat16}
SHAPE = (1, 3, 8, 10, 12)
CONFIGS: dict[SchedulerKind, dict[str, Any]] = {
    "ddim": {"snr_shift_scale": 3.0},
    "dpm": {"snr_shift_scale": 1.0},
}
REFERENCES = {"ddim": CogVideoXDDIMScheduler, "dpm": CogVideoXDPMScheduler}
PREDICTIONS = ("v_prediction", "epsilon", "sample")


def differing(found: NDArray[np.float32], expected: torch.Tensor) -> float:
    """Return the share of values that differ, after making sure that none does by more than a step of the largest."""
    assert expected.dtype in HALVES.values()
    reference = expected.float().numpy()
    step = np.abs(reference).max() * float(torch.finfo(expected.dtype).eps)  # a tie in noise, which may be large
    assert np.abs(found - reference).max() <= step
    return float((found != reference).mean())


@pytest.mark.parametrize("kept", HALVES)
@pytest.mark.parametrize("seed", [0, 7, 2**40 + 3])
def test_noise_in_half_precision_equals_torch(seed: int, kept: Precision) -> None:
    ours, theirs = Generator(seed, kept), torch.Generator("cpu").manual_seed(seed)
    for shape in ((3,), (20,), (2,), (1, 13, 16, 6, 9), (5,)):
        drawn = torch.randn(shape, generator=theirs, dtype=HALVES[kept])
        assert differing(ours.randn(shape), drawn) <= ROUNDED_OTHERWISE


def test_twin_noise_in_another_type_does_not_agree() -> None:
    drawn = torch.randn(SHAPE, generator=torch.Generator("cpu").manual_seed(7), dtype=torch.bfloat16)
    assert (Generator(7, "fp16").randn(SHAPE) != drawn.float().numpy()).mean() > ROUNDED_OTHERWISE


def config_of(kind: SchedulerKind, prediction: str) -> dict[str, Any]:
    """Return the config of a published model, with another prediction."""
    rest = {"timestep_spacing": "trailing", "rescale_betas_zero_snr": prediction != "epsilon"}
    return {"prediction_type": prediction, **rest, **CONFIGS[kind]}


def steps_of(kind: SchedulerKind, prediction: str, kept: Precision, own: Precision) -> float:
    """Take six steps, each from the latents that diffusers came to, and return the share of values that differ."""
    config = config_of(kind, prediction)
    theirs = REFERENCES[kind].from_config(config)
    theirs.set_timesteps(6)
    ours = make_scheduler(kind, SchedulerConfig.from_config(config), 6, kept=own)
    draws, generator = torch.Generator("cpu").manual_seed(17), Generator(17, kept)
    latents = torch.randn(SHAPE, generator=draws, dtype=HALVES[kept])
    generator.randn(SHAPE)
    original, share = None, 0.0
    for index, timestep in enumerate(theirs.timesteps):
        output = np.random.default_rng(index).standard_normal(SHAPE).astype(np.float32)
        found = ours.step(index, output, latents.float().numpy(), generator)
        said = torch.from_numpy(output)
        if kind == "ddim":
            following = theirs.step(said, timestep, latents, return_dict=False)[0]
        else:
            back = theirs.timesteps[index - 1] if index else None
            following, original = theirs.step(said, original, timestep, back, latents, generator=draws)
        latents = following.to(HALVES[kept])
        if own == kept:
            share = max(share, differing(found, latents))
        else:
            share = max(share, float((rounded(found, kept) != latents.float().numpy()).mean()))
    return share


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("kept", HALVES)
@pytest.mark.parametrize("kind", REFERENCES)
def test_every_step_in_half_precision_equals_diffusers(kind: SchedulerKind, kept: Precision, prediction: str) -> None:
    assert steps_of(kind, prediction, kept, kept) <= ROUNDED_OTHERWISE


@pytest.mark.parametrize("kind", REFERENCES)
def test_twin_rounding_after_each_step_alone_does_not_agree(kind: SchedulerKind) -> None:
    assert steps_of(kind, "v_prediction", "bf16", "fp32") > ROUNDED_OTHERWISE


def noisy(kind: SchedulerKind, kept: Precision) -> tuple[Scheduler, NDArray[np.float32], torch.Tensor]:
    """Return a scheduler, the latents it makes noisy, and what diffusers makes of them."""
    config = config_of(kind, "v_prediction")
    theirs = REFERENCES[kind].from_config(config)
    theirs.set_timesteps(6)
    first, second = (torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    clean, noise = first.to(HALVES[kept]), second.to(HALVES[kept])
    ours = make_scheduler(kind, SchedulerConfig.from_config(config), 6, 2, kept)
    made = ours.add_noise(clean.float().numpy(), noise.float().numpy(), 2)
    return ours, made, theirs.add_noise(clean, noise, theirs.timesteps[2:3])


@pytest.mark.parametrize("kept", HALVES)
@pytest.mark.parametrize("kind", REFERENCES)
def test_a_clip_made_noisy_in_half_precision_equals_diffusers(kind: SchedulerKind, kept: Precision) -> None:
    _, made, expected = noisy(kind, kept)
    assert differing(made, expected) <= ROUNDED_OTHERWISE


def in_float32(pipe: DiffusionPipeline, dtype: torch.dtype) -> None:
    """Let a pipeline's networks compute in float32 whatever they are given, and the VAE put out moments of a type."""

    def widen(_: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        halves = {key: value for key, value in kwargs.items() if isinstance(value, torch.Tensor)}
        return args, {**kwargs, **{key: value.float() for key, value in halves.items() if value.is_floating_point()}}

    pipe.transformer.register_forward_pre_hook(widen, with_kwargs=True)
    encode, decode = pipe.vae.encode, pipe.vae.decode
    pipe.vae.decode = lambda latents: decode(latents.float())

    def encoded(pixels: torch.Tensor) -> Any:
        output = encode(pixels.float())
        output.latent_dist = DiagonalGaussianDistribution(output.latent_dist.parameters.to(dtype))
        return output

    pipe.vae.encode = encoded


def embeds_of(bundle: Bundle) -> torch.Tensor:
    """Return embeddings of a prompt and of a negative one, (2, S, D)."""
    spec = next(spec for spec in bundle.network("transformer").inputs if spec.name == "encoder_hidden_states")
    return torch.randn(spec.resolve({"batch": 2}), generator=torch.Generator().manual_seed(1))


TEXT, IMAGE, VIDEO = CogVideoXPipeline, CogVideoXImageToVideoPipeline, CogVideoXVideoToVideoPipeline


def same(pipeline: type[DiffusionPipeline], checkpoint: Path, bundle: Bundle, kept: Precision) -> float:
    """Make a video in diffusers with latents in half precision, and return the PSNR of ours."""
    dtype, shape = HALVES[kept], bundle.shape
    pipe = pipeline.from_pretrained(checkpoint, dtype=torch.float32, text_encoder=None, tokenizer=None)
    pipe.set_progress_bar_config(disable=True)
    in_float32(pipe, dtype)
    both = embeds_of(bundle).to(dtype)
    pixels = torch.from_numpy(clip(bundle) * 2 - 1).to(dtype).float() / 2 + 0.5  # as the pipeline rounds them
    call: dict[str, Any] = {"num_inference_steps": 3}
    theirs: dict[str, Any] = {"num_frames": shape.frames}
    if pipeline is IMAGE:
        call["image"], theirs["image"] = pixels[0].numpy(), pixels[:1].permute(0, 3, 1, 2)
    elif pipeline is VIDEO:
        call |= {"video": pixels.numpy(), "strength": 0.7}
        theirs = {"video": pixels.permute(0, 3, 1, 2)[None], "strength": 0.7}
    expected = pipe(
        prompt_embeds=both[:1], negative_prompt_embeds=both[1:], num_inference_steps=3, **theirs,
        height=shape.height, width=shape.width, generator=torch.Generator().manual_seed(3), output_type="np",
    ).frames[0]  # fmt: skip
    embeds = both.float().numpy()
    call |= {"prompt_embeds": embeds[:1], "negative_prompt_embeds": embeds[1:], "seed": 3}
    with Pipeline(bundle) as ours:
        return psnr(ours(latents_dtype=kept, **call).frames[0], expected)


def clip(bundle: Bundle) -> NDArray[np.float32]:
    """Return smooth pictures of a bundle's size, (F, H, W, 3) in [0, 1]."""
    shape, random = bundle.shape, np.random.default_rng(1)
    small = [Image.fromarray(random.integers(0, 255, (4, 5, 3), np.uint8)) for _ in range(shape.frames)]
    large = [picture.resize((shape.width, shape.height), Image.Resampling.BICUBIC) for picture in small]
    return np.stack([np.asarray(picture, np.float32) / 255 for picture in large])


@pytest.mark.parametrize(
    ("name", "pipeline", "kept"),
    [
        ("2b", TEXT, "fp16"),  # ddim
        ("5b", TEXT, "bf16"),  # dpm, as those below
        ("5b-i2v", IMAGE, "bf16"),
        ("5b", VIDEO, "fp16"),
        pytest.param("1.5-5b-i2v", IMAGE, "fp16", marks=pytest.mark.nightly),
        pytest.param("1.5-5b-i2v", IMAGE, "bf16", marks=pytest.mark.nightly),
    ],
)
def test_a_pipeline_that_keeps_latents_in_half_precision_makes_the_same_video(
    name: str, pipeline: type[DiffusionPipeline], kept: Precision, tiny: Tiny, exported: Exported
) -> None:
    assert same(pipeline, tiny(name), exported(name), kept) > PIXELS_PSNR


def test_twin_latents_in_another_type_do_not_make_the_same_video(exported: Exported) -> None:
    bundle = exported("5b")
    embeds = embeds_of(bundle).bfloat16().float().numpy()
    call: dict[str, Any] = {"prompt_embeds": embeds[:1], "guidance_scale": 1.0, "num_inference_steps": 3}
    with Pipeline(bundle) as pipe:
        wide, half, other = (pipe(latents_dtype=kept, **call).frames[0] for kept in ("fp32", "bf16", "fp16"))
    assert max(psnr(half, wide), psnr(half, other)) < PIXELS_PSNR


@pytest.fixture
def latents(tmp_path: Path) -> Path:
    """Finished latents of the miniature, in float32."""
    np.save(tmp_path / "latents.npy", np.full((1, 3, 8, 6, 6), 1 / 3, np.float32))
    return tmp_path / "latents.npy"


def test_latents_of_a_run_in_half_precision_decode_to_the_same_video(tmp_path: Path) -> None:
    how = ("--latents-dtype", "bf16", "--threads", "1", "-q")
    kept, first, second = (tmp_path / name for name in ("kept.npy", "first.npy", "second.npy"))
    words = ("run", "--prompt", "a red circle", "--steps", "2", *how, "--save-latents", kept, "--output", first)
    assert cvx(*words).code == 0
    assert cvx("run", "--from-latents", kept, *how, "--output", second).code == 0
    np.testing.assert_array_equal(np.load(first), np.load(second))


def test_what_no_pipeline_in_half_precision_does_is_refused(latents: Path, tmp_path: Path, exported: Exported) -> None:
    how = ("--latents-dtype", "bf16", "--threads", "1", "--output", tmp_path / "video.npy")
    line = cvx("run", "--from-latents", latents, *how).failure()
    assert "latents.npy hold values that bf16 has not. fix: use latents of a run with --latents-dtype bf16" in line
    line = cvx("run", "--prompt", "x", "--fast", *how).failure()
    assert "--fast beside --latents-dtype means nothing: it repeats a pipeline of diffusers, which runs every" in line
    line = cvx("run", "--prompt", "x", "--bundle", exported("5b", precision="fp16").path, *how).failure()
    assert "latents in bf16 cannot go through a transformer in fp16" in line
    assert "use --latents-dtype fp16, or export with --precision bf16." in line


def test_noise_that_the_type_has_not_is_refused() -> None:
    with Pipeline.from_pretrained("mini") as pipe:
        noise = np.full((1, 3, 8, 6, 6), 1 / 3, np.float32)
        call: dict[str, Any] = {"num_inference_steps": 1, "output_type": "latent", "latents_dtype": "fp16"}
        with pytest.raises(CvxError, match="latents hold values that fp16 has not"):
            pipe("a red circle", latents=noise, **call)
        made = pipe("a red circle", latents=rounded(noise, "fp16"), **call).latents
        np.testing.assert_array_equal(made, rounded(made, "fp16"))
        with pytest.raises(CvxError, match=r"latents_dtype 'half'\. fix: use fp32 or fp16 or bf16"):
            pipe("a red circle", latents_dtype="half")
