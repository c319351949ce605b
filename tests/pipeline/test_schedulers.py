"""The schedulers against diffusers', step by step, with the same model outputs and the same seed."""

import math
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
)

from cvx_deploy.errors import CheckpointError, CvxError
from cvx_deploy.families.cogvideox.models import SchedulerKind
from cvx_deploy.pipeline.noise import Generator
from cvx_deploy.pipeline.schedulers import SchedulerConfig, dynamic_guidance_scale, make_scheduler, timesteps_for

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")

TOLERANCE = 1e-5  # float32 latents of size 1, and noise that itself agrees to 1e-6
SHAPE = (1, 3, 4, 5, 6)  # (B, F, C, H, W)
KINDS: tuple[SchedulerKind, ...] = ("ddim", "dpm")
REFERENCES: dict[str, type[Any]] = {"ddim": CogVideoXDDIMScheduler, "dpm": CogVideoXDPMScheduler}

CONFIG_5B: dict[str, Any] = {
    "_class_name": "CogVideoXDPMScheduler",
    "_diffusers_version": "0.31.0.dev0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "clip_sample_range": 1.0,
    "num_train_timesteps": 1000,
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "sample_max_value": 1.0,
    "set_alpha_to_one": True,
    "snr_shift_scale": 1.0,
    "steps_offset": 0,
    "timestep_spacing": "trailing",
    "trained_betas": None,
}
CONFIG_2B = CONFIG_5B | {"_class_name": "CogVideoXDDIMScheduler", "snr_shift_scale": 3.0}
PUBLISHED = {"2b": CONFIG_2B, "5b": CONFIG_5B}


def reference_run(
    kind: str, config: dict[str, Any], steps: int, outputs: np.ndarray, start: int, seed: int
) -> Iterator[np.ndarray]:
    """Step diffusers' scheduler as its pipelines do, yielding the latents before the first step and after each."""
    scheduler = REFERENCES[kind].from_config(config)
    scheduler.set_timesteps(steps)
    timesteps = scheduler.timesteps[start:]
    generator = torch.Generator("cpu").manual_seed(seed)
    latents = torch.randn(SHAPE, generator=generator)
    yield latents.numpy()
    original = None
    for index, timestep in enumerate(timesteps):
        output = torch.from_numpy(outputs[index])
        if kind == "ddim":
            latents = scheduler.step(output, timestep, latents, generator=generator, return_dict=False)[0]
        else:
            back = timesteps[index - 1] if index > 0 else None
            latents, original = scheduler.step(output, original, timestep, back, latents, generator=generator)
        yield latents.numpy()


def own_run(
    kind: SchedulerKind, config: dict[str, Any], steps: int, outputs: np.ndarray, start: int, seed: int
) -> Iterator[np.ndarray]:
    """Do the same with the scheduler under test."""
    scheduler = make_scheduler(kind, SchedulerConfig.from_config(config), steps, start)
    generator = Generator(seed)
    latents = generator.randn(SHAPE)
    yield latents
    for index in range(scheduler.start, len(scheduler.timesteps)):
        latents = scheduler.step(index, outputs[index - start], latents, generator)
        assert latents.dtype == np.float32
        yield latents


def differences(
    kind: SchedulerKind, config: dict[str, Any], steps: int, *, start: int = 0, corrupt: dict[str, Any] | None = None
) -> list[float]:
    """Return the largest difference after every step, relative to the largest latent or 1, whichever is more.

    `corrupt` changes the config on this side only.
    """
    outputs = np.random.default_rng(steps).standard_normal((steps - start, *SHAPE)).astype(np.float32)
    reference = reference_run(kind, config, steps, outputs, start, seed=17)
    own = own_run(kind, config | (corrupt or {}), steps, outputs, start, seed=17)
    return [float(np.abs(a - b).max() / max(1, np.abs(a).max())) for a, b in zip(reference, own, strict=True)]


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 50])
@pytest.mark.parametrize("model", PUBLISHED)
@pytest.mark.parametrize("kind", KINDS)
def test_published_configs_match_diffusers_at_every_step(kind: SchedulerKind, model: str, steps: int) -> None:
    assert max(differences(kind, PUBLISHED[model], steps)) <= TOLERANCE


@pytest.mark.parametrize("start", [1, 4, 6])
@pytest.mark.parametrize("kind", KINDS)
def test_a_start_in_the_middle_matches_diffusers(kind: SchedulerKind, start: int) -> None:
    assert max(differences(kind, CONFIG_2B, 7, start=start)) <= TOLERANCE


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("kind", KINDS)
def test_other_predictions_and_spacings_match_diffusers(kind: SchedulerKind, prediction: str, spacing: str) -> None:
    config = CONFIG_2B | {
        "prediction_type": prediction,
        "timestep_spacing": spacing,
        "rescale_betas_zero_snr": prediction != "epsilon",
        "steps_offset": 1,
        "set_alpha_to_one": spacing != "leading",
    }
    for steps in (1, 3, 10):
        assert max(differences(kind, config, steps)) <= TOLERANCE


@pytest.mark.parametrize("kind", KINDS)
def test_linear_betas_and_diffusers_defaults_match_diffusers(kind: SchedulerKind) -> None:
    config = {"beta_schedule": "linear", "prediction_type": "v_prediction"}
    assert max(differences(kind, config, 20)) <= TOLERANCE
    assert asdict(SchedulerConfig.from_config({})).items() <= dict(REFERENCES[kind]().config).items()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "corrupt",
    [
        {"snr_shift_scale": 1.5},
        {"beta_end": 0.0125},
        {"rescale_betas_zero_snr": False},
        {"prediction_type": "sample"},
        {"timestep_spacing": "leading"},
    ],
)
def test_twin_a_corrupted_config_disagrees(kind: SchedulerKind, corrupt: dict[str, Any]) -> None:
    assert max(differences(kind, CONFIG_5B, 7, corrupt=corrupt)) > 100 * TOLERANCE


def test_twin_one_draw_too_many_disagrees() -> None:
    outputs = np.zeros((5, *SHAPE), dtype=np.float32)
    expected = list(reference_run("dpm", CONFIG_5B, 5, outputs, 0, seed=3))[-2]  # the last step adds no noise
    scheduler = make_scheduler("dpm", SchedulerConfig.from_config(CONFIG_5B), 5)
    for extra_draws, agrees in ((0, True), (1, False)):
        generator = Generator(3)
        latents = generator.randn(SHAPE)
        for index in range(4):
            latents = scheduler.step(index, outputs[index], latents, generator)
            for _ in range(extra_draws):
                generator.randn(SHAPE)
        assert bool(np.abs(latents - expected).max() <= TOLERANCE) is agrees


@pytest.mark.parametrize("kind", KINDS)
def test_a_scheduler_used_twice_forgets_its_first_run(kind: SchedulerKind) -> None:
    scheduler = make_scheduler(kind, SchedulerConfig.from_config(CONFIG_5B), 3)
    latents = np.ones(SHAPE, dtype=np.float32)

    def run() -> np.ndarray:
        generator, result = Generator(0), latents
        for index in range(3):
            result = scheduler.step(index, 0.5 * latents, result, generator)
        return result

    np.testing.assert_array_equal(run(), run())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model", PUBLISHED)
def test_added_noise_matches_diffusers(kind: SchedulerKind, model: str) -> None:
    scheduler = make_scheduler(kind, SchedulerConfig.from_config(PUBLISHED[model]), 7)
    reference = REFERENCES[kind].from_config(PUBLISHED[model])
    reference.set_timesteps(7)
    original, noise = np.random.default_rng(0).standard_normal((2, *SHAPE)).astype(np.float32)
    for index in range(7):
        noisy = scheduler.add_noise(original, noise, index)
        expected = reference.add_noise(
            torch.from_numpy(original), torch.from_numpy(noise), reference.timesteps[index : index + 1]
        ).numpy()
        assert noisy.dtype == np.float32
        assert np.abs(noisy - expected).max() <= 1e-6
        assert np.abs(scheduler.add_noise(original, noise, (index + 1) % 7) - expected).max() > 0.01


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
def test_every_step_count_has_diffusers_timesteps_or_is_refused(spacing: str) -> None:
    raw = CONFIG_5B | {"timestep_spacing": spacing}
    config, reference = SchedulerConfig.from_config(raw), CogVideoXDDIMScheduler.from_config(raw)
    refused = 0
    for steps in range(1, 1001):
        reference.set_timesteps(steps)
        expected = reference.timesteps.numpy()
        if expected.min() < 0:
            refused += 1
            with pytest.raises(CvxError, match="leaves the timesteps 0 to 999"):
                timesteps_for(config, steps)
        else:
            np.testing.assert_array_equal(timesteps_for(config, steps), expected)
    assert refused == (62 if spacing == "trailing" else 0)


@pytest.mark.parametrize(
    ("steps", "fix"), [(0, "between 1 and 1000"), (1001, "between 1 and 1000"), (61, "--steps 60")]
)
def test_impossible_step_counts_say_which_ones_work(steps: int, fix: str) -> None:
    with pytest.raises(CvxError, match=f"^{steps} steps: .* fix: use --steps .*{fix.removeprefix('--steps ')}"):
        make_scheduler("dpm", SchedulerConfig.from_config(CONFIG_5B), steps)


@pytest.mark.parametrize("start", [-1, 7])
def test_a_start_outside_the_schedule_is_refused(start: int) -> None:
    with pytest.raises(CvxError, match=f"step {start} of 7 is no place to start"):
        make_scheduler("ddim", SchedulerConfig.from_config(CONFIG_5B), 7, start)


def test_predicting_noise_from_pure_noise_is_refused() -> None:
    config = SchedulerConfig.from_config(CONFIG_5B | {"prediction_type": "epsilon"})
    with pytest.raises(CheckpointError, match="'epsilon', but timestep 999 is pure noise"):
        make_scheduler("ddim", config, 7)
    make_scheduler("ddim", config, 7, start=1)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("_class_name", "EulerDiscreteScheduler"),
        ("trained_betas", [0.1, 0.2]),
        ("beta_schedule", "squaredcos_cap_v2"),
        ("prediction_type", "flow"),
        ("timestep_spacing", None),
        ("num_train_timesteps", 1000.0),
        ("num_train_timesteps", 0),
        ("num_train_timesteps", 1),
        ("beta_start", -0.1),
        ("beta_end", "0.012"),
        ("beta_end", math.nan),
        ("steps_offset", 1000),
        ("snr_shift_scale", 0),
        ("snr_shift_scale", math.inf),
        ("set_alpha_to_one", 1),
    ],
)
def test_a_config_that_cannot_be_followed_is_refused_by_key(key: str, value: object) -> None:
    with pytest.raises(CheckpointError, match=key):
        SchedulerConfig.from_config(CONFIG_5B | {key: value})


@pytest.mark.parametrize("steps", [3, 10])
def test_dynamic_guidance_is_what_diffusers_pipeline_uses(steps: int) -> None:
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=1, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=2, text_embed_dim=4,
        num_layers=1, sample_width=2, sample_height=2, sample_frames=9, max_text_seq_length=3,
    )  # fmt: skip
    scheduler = CogVideoXDDIMScheduler.from_config(CONFIG_2B)
    pipeline = CogVideoXPipeline(
        tokenizer=None, text_encoder=None, vae=None, transformer=transformer, scheduler=scheduler
    )
    pipeline.set_progress_bar_config(disable=True)
    used: dict[int, float] = {}

    def note(pipe: CogVideoXPipeline, index: int, timestep: torch.Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        used[int(timestep)] = pipe.guidance_scale
        return tensors

    embeds = torch.zeros(1, 3, 4)
    pipeline(
        prompt_embeds=embeds, negative_prompt_embeds=embeds, num_frames=9, height=16, width=16, max_sequence_length=3,
        num_inference_steps=steps, guidance_scale=6.0, use_dynamic_cfg=True, output_type="latent",
        callback_on_step_end=note,
    )  # fmt: skip
    assert used == {timestep: dynamic_guidance_scale(6.0, steps, timestep) for timestep in used}
    assert used != {timestep: dynamic_guidance_scale(6.0, steps + 1, timestep) for timestep in used}
    assert len(used) == steps


def test_a_refusal_prints_no_list_of_a_thousand_betas() -> None:
    with pytest.raises(CheckpointError, match=r"trained_betas is \[0.1, 0.1, .* \.\.\. .*\], not null") as failure:
        SchedulerConfig.from_config(CONFIG_5B | {"trained_betas": [0.1] * 1000})
    assert len(str(failure.value)) < 300
