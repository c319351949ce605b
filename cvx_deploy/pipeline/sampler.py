"""The denoising loop, as a generator over steps: timing, previews and parity look on without flags."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cvx_deploy.engines.backend import Backend, Session
from cvx_deploy.errors import EngineError
from cvx_deploy.pipeline.noise import Generator
from cvx_deploy.pipeline.schedulers import Scheduler, dynamic_guidance_scale

Latents = NDArray[np.float32]  # (B, F, C, H, W) with B = 1
Modulation = list[NDArray[np.floating[Any]]]
"""What the transformer's norms take at each step, each (1, rows, D)."""

_OFS = 2.0  # the constant that the 1.5 image-to-video pipeline feeds


@dataclass(frozen=True)
class Conditions:
    """What steers one video.

    Attributes:
        modulation: Of each of the scheduler's steps; see `modulation_of`.
        prompt_embeds: (1, S, D) without guidance; (2, S, D) with it, the negative prompt first.
        guidance_scale: Weight of the prompt against the negative prompt; at most 1 means no guidance.
        dynamic: Whether the weight follows `dynamic_guidance_scale`.
        image_latents: (1, F, C, H, W), the scaled first frame and zeros after it, for image-to-video models.
    """

    modulation: Modulation
    prompt_embeds: NDArray[np.float32]
    guidance_scale: float
    dynamic: bool = False
    image_latents: Latents | None = None


@dataclass(frozen=True)
class Step:
    """One step that has been taken: its index in the schedule, its timestep, and the latents after it."""

    index: int
    timestep: int
    latents: Latents


def modulation_of(backend: Backend, scheduler: Scheduler) -> Modulation:
    """Run the modulation network for every step that `scheduler` will take, and let go of it."""
    ofs = {"ofs": np.array([_OFS], np.float32)} if backend.bundle.manifest.traits.ofs else {}
    with backend.load("modulation", {}) as session:
        runs = (
            session.run({"timestep": np.array([timestep], np.int64), **ofs})["modulation"]
            for timestep in scheduler.timesteps[scheduler.start :]
        )
        return [backend.to_host(rows) for rows in runs]


def denoise(
    backend: Backend,
    session: Session,
    scheduler: Scheduler,
    latents: Latents,
    conditions: Conditions,
    generator: Generator,
) -> Iterator[Step]:
    """Yield every step from `latents` to the finished ones.

    Args:
        backend: Brings the prompt embeddings to the device and predictions to the host.
        session: The loaded transformer, at the batch size of the prompt embeddings.
        scheduler: Fresh for this video.
        latents: Noise, or a noised video where the scheduler starts in the middle.
        conditions: What steers it.
        generator: Continues the draws that made `latents`.

    Raises:
        EngineError: The latents stopped being numbers, which half precision can do.
    """
    prompt_embeds = backend.to_device(conditions.prompt_embeds)  # the same at every step
    timesteps = scheduler.timesteps
    steps = len(timesteps) - scheduler.start
    for index in range(scheduler.start, len(timesteps)):
        timestep = int(timesteps[index])
        inputs = {
            "hidden_states": _hidden_states(latents, conditions),
            "encoder_hidden_states": prompt_embeds,
            "modulation": conditions.modulation[index - scheduler.start],
        }
        prediction = backend.to_host(session.run(inputs)["noise_pred"])
        if len(prediction) == 2:
            scale = conditions.guidance_scale
            if conditions.dynamic:
                scale = dynamic_guidance_scale(scale, steps, timestep)
            negative, positive = prediction[:1], prediction[1:]
            prediction = negative + np.float32(scale) * (positive - negative)
        latents = scheduler.step(index, prediction, latents, generator)
        if not np.isfinite(latents).all():
            raise EngineError(
                f"the latents stopped being finite numbers at step {index + 1} (timestep {timestep})",
                fix="export with --precision fp32, or check the checkpoint's weights",
            )
        yield Step(index, timestep, latents)


def _hidden_states(latents: Latents, conditions: Conditions) -> Latents:
    hidden = latents
    if conditions.image_latents is not None:
        hidden = np.concatenate([latents, conditions.image_latents], axis=2)
    return np.repeat(hidden, len(conditions.prompt_embeds), axis=0)
