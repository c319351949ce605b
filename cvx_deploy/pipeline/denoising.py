"""The videos of a run on their way from noise to latents, whichever device denoises which."""

from collections.abc import Generator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from cvx_deploy.bundle.opened import Bundle
from cvx_deploy.engines.backend import Backend
from cvx_deploy.errors import ShapeError
from cvx_deploy.pipeline.events import Step
from cvx_deploy.pipeline.noise import Generator as NoiseGenerator
from cvx_deploy.pipeline.policy import Action, StepPolicy
from cvx_deploy.pipeline.report import StepsTaken
from cvx_deploy.pipeline.request import RunRequest
from cvx_deploy.pipeline.resume import ResumePoint
from cvx_deploy.pipeline.rounding import rounded
from cvx_deploy.pipeline.sampler import Conditions, Latents, Modulation, Sessions, denoise
from cvx_deploy.pipeline.schedulers import Scheduler
from cvx_deploy.pipeline.windows import Plan


@dataclass
class Videos:
    """What is known of each video before it is denoised, and what is afterwards.

    Attributes:
        bundle: What makes them; `request` what was asked for, and `plan` by which windows.
        schedulers: One a video, fresh; `policies` and `generators` likewise, and `encoded`, what the VAE said of the
            image or the clip it starts from.
        prompt_embeds: One a prompt.
        modulation: Of each step.
        finished: Latents without padding, by video.
        taken: What was done at each step, by video, where a policy decided it.
    """

    bundle: Bundle
    request: RunRequest
    plan: Plan
    schedulers: list[Scheduler]
    policies: list[StepPolicy | None]
    generators: list[NoiseGenerator]
    prompt_embeds: list[NDArray[np.float32]]
    encoded: list[Latents | None]
    modulation: Modulation
    finished: dict[int, Latents] = field(default_factory=dict)
    taken: dict[int, StepsTaken] = field(default_factory=dict)

    def denoised(self, device: Backend, videos: Sequence[int]) -> Generator[Step, None, None]:
        """Yield the steps of some videos, and keep what they come to."""
        guided = self.request.is_guided
        with ExitStack() as stack:
            both = stack.enter_context(device.load("transformer", {"batch": (2 if guided else 1) * self.plan.at_once}))
            sessions = Sessions(both)
            if guided and any(policy is not None and policy.splits for policy in self.policies):
                sessions = Sessions(both, stack.enter_context(device.load("transformer", {"batch": self.plan.at_once})))
            for index in videos:
                yield from self._denoised(device, sessions, index)

    def _denoised(self, device: Backend, sessions: Sessions, index: int) -> Generator[Step, None, None]:
        request, scheduler, generator = self.request, self.schedulers[index], self.generators[index]
        latents, image_latents = _start(self, index)
        conditions = Conditions(
            self.modulation,
            self.prompt_embeds[index // request.num_videos],
            request.guidance_scale,
            request.dynamic_cfg,
            image_latents,
            self.plan,
        )
        taken = 0
        if request.resume is not None:
            taken = request.resume.taken
            latents = request.resume.restore(latents, scheduler, generator)
        count, policy = len(scheduler.timesteps) - scheduler.start, self.policies[index]
        actions: list[Action] = []
        error: float | None = None
        for step in denoise(device, sessions, scheduler, latents, conditions, generator, policy, taken):
            latents, error = step.latents, error if step.error is None else step.error
            actions.append(step.action)
            is_forecast = step.action == "forecast"
            done = step.index - scheduler.start
            point = ResumePoint.after(done + 1, latents, scheduler, generator) if policy is None else None
            yield Step(index, done, count, step.timestep, latents, is_forecast, point)
        self.finished[index] = latents[:, self.plan.padding :]
        if policy is not None:
            self.taken[index] = _steps_taken(actions, error, calibrated=policy.forecast.weights is not None)


def _steps_taken(actions: Sequence[Action], error: float | None, *, calibrated: bool) -> StepsTaken:
    run, conditional, forecast = (
        tuple(step for step, action in enumerate(actions) if action == wanted)
        for wanted in ("run", "conditional", "forecast")
    )
    return StepsTaken(run, conditional, forecast, error, calibrated)


def _start(videos: Videos, index: int) -> tuple[Latents, Latents | None]:
    """Return the latents that denoising starts from, and the image latents that go along with them."""
    request, plan, encoded = videos.request, videos.plan, videos.encoded[index]
    facts, kept = videos.bundle.manifest.vae, request.latents_dtype
    # 1.5 was trained on image latents divided by the scale; diffusers calls it invert_scale_latents.
    inverted = request.video is None and facts.invert_scale_latents
    scale = np.float32(1 / facts.scaling_factor if inverted else facts.scaling_factor)
    given = None if request.latents is None else _given_noise(request.latents[index][None], plan.latent_shape)
    noise = plan.noise(videos.generators[index]) if given is None else given
    if encoded is None:
        return noise, None
    scaled = rounded(scale * encoded, kept)
    if request.video is not None:
        scheduler = videos.schedulers[index]
        return scheduler.add_noise(scaled, noise, scheduler.start), None
    image_latents = np.zeros(plan.latent_shape, np.float32)
    image_latents[:, :1] = scaled
    return noise, image_latents


def _given_noise(latents: Latents, shape: tuple[int, ...]) -> Latents:
    """Return noise that was given in place of drawn noise, as diffusers takes its ``latents``."""
    if latents.shape != shape:
        raise ShapeError(
            f"the noise for a video has the shape {latents.shape[1:]}, not {shape[1:]} (F, C, H, W)",
            fix="give latents of that shape for every video",
        )
    return np.array(latents, np.float32)
