"""The denoising loop, as a generator over steps: timing, previews and parity look on without flags."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cvx_deploy.engines.backend import Backend, DeviceTensor, Session
from cvx_deploy.errors import CvxError, EngineError
from cvx_deploy.pipeline.forecast import Forecaster
from cvx_deploy.pipeline.noise import Generator
from cvx_deploy.pipeline.policy import Action, StepPolicy
from cvx_deploy.pipeline.schedulers import Scheduler, dynamic_guidance_scale
from cvx_deploy.pipeline.windows import Plan

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
        plan: The windows that the transformer is shown; None shows it all at once.
    """

    modulation: Modulation
    prompt_embeds: NDArray[np.float32]
    guidance_scale: float
    dynamic: bool = False
    image_latents: Latents | None = None
    plan: Plan | None = None


@dataclass(frozen=True)
class Step:
    """One step that has been taken.

    Attributes:
        index: Its place in the schedule.
        timestep: The scheduler's.
        latents: What they are after it.
        action: Whether the transformer was run.
        error: How far what it said was from its forecast, L2 norm over that of what it said; None without a forecast.
    """

    index: int
    timestep: int
    latents: Latents
    action: Action = "run"
    error: float | None = None


def modulation_of(backend: Backend, scheduler: Scheduler) -> Modulation:
    """Run the modulation network for every step that `scheduler` will take, and let go of it."""
    ofs = {"ofs": np.array([_OFS], np.float32)} if backend.bundle.manifest.traits.ofs else {}
    with backend.load("modulation", {}) as session:
        runs = (
            session.run({"timestep": np.array([timestep], np.int64), **ofs})["modulation"]
            for timestep in scheduler.timesteps[scheduler.start :]
        )
        return [backend.to_host(rows) for rows in runs]


@dataclass(frozen=True)
class Sessions:
    """The loaded transformer.

    Attributes:
        both: At the batch size of the prompt embeddings.
        conditional: At a batch of one, where a policy runs the prompt's branch alone.
    """

    both: Session
    conditional: Session | None = None


def denoise(
    backend: Backend,
    sessions: Sessions,
    scheduler: Scheduler,
    latents: Latents,
    conditions: Conditions,
    generator: Generator,
    policy: StepPolicy | None = None,
    taken: int = 0,
) -> Iterator[Step]:
    """Yield every step from `latents` to the finished ones.

    Args:
        backend: Brings the prompt embeddings to the device and predictions to the host.
        sessions: The loaded transformer.
        scheduler: Fresh for this video.
        latents: Noise, or a noised video where the scheduler starts in the middle.
        conditions: What steers it.
        generator: Continues the draws that made `latents`; a step that is forecast draws what one that is run does.
        policy: Says which steps are run, fresh for this video; None runs all.
        taken: How many steps `latents` have been through already.

    Raises:
        EngineError: The latents stopped being numbers, which half precision can do.
    """
    transformer = _Transformer(backend, sessions, conditions)
    outputs = _Outputs(transformer, scheduler, policy)
    timesteps = scheduler.timesteps
    steps = len(timesteps) - scheduler.start
    for index in range(scheduler.start + taken, len(timesteps)):
        timestep = int(timesteps[index])
        prediction = outputs.at(index, latents)
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
        yield Step(index, timestep, latents, outputs.action, outputs.error)


class _Transformer:
    """Runs the network, for both branches or for the prompt's alone."""

    def __init__(self, backend: Backend, sessions: Sessions, conditions: Conditions) -> None:
        self._backend, self._sessions, self._conditions = backend, sessions, conditions
        copies = 1 if conditions.plan is None else conditions.plan.at_once
        embeds = np.tile(conditions.prompt_embeds, (copies, 1, 1))  # the same at every step
        self._both = backend.to_device(embeds)
        self.is_guided = len(conditions.prompt_embeds) == 2
        if self.is_guided and sessions.conditional is not None:
            self._conditional = backend.to_device(np.tile(conditions.prompt_embeds[1:], (copies, 1, 1)))

    def run(self, step: int, latents: Latents) -> Latents:
        """Return what it says of both branches."""
        return self._run(self._sessions.both, self._both, step, latents, 1 + self.is_guided)

    def run_conditional(self, step: int, latents: Latents) -> Latents:
        """Return what it says of the prompt's branch."""
        if self._sessions.conditional is None:
            raise CvxError(
                "the step policy runs one branch alone, and does not say beforehand that it splits them",
                fix="set its `splits` to True",
            )
        return self._run(self._sessions.conditional, self._conditional, step, latents, 1)

    def _run(self, session: Session, embeds: DeviceTensor, step: int, latents: Latents, branches: int) -> Latents:
        def say(hidden: Latents) -> Latents:
            inputs = {
                "hidden_states": np.repeat(hidden, branches, 0),
                "encoder_hidden_states": embeds,
                "modulation": self._conditions.modulation[step],
            }
            output: Latents = self._backend.to_host(session.run(inputs)["noise_pred"])
            return output

        hidden, plan = self._hidden(latents), self._conditions.plan
        return say(hidden) if plan is None else plan.averaged(step, hidden, say)

    def _hidden(self, latents: Latents) -> Latents:
        image = self._conditions.image_latents
        return latents if image is None else np.concatenate([latents, image], axis=2)


class _Outputs:
    """Says what the transformer says of each step, or would say, as a policy wants it.

    Attributes:
        action: What was done at the last step that was asked for.
        error: How far what was run there was from its forecast; None where there is none.
    """

    def __init__(self, transformer: _Transformer, scheduler: Scheduler, policy: StepPolicy | None) -> None:
        self._transformer, self._start, self._policy = transformer, scheduler.start, policy
        self.action: Action = "run"
        self.error: float | None = None
        if policy is not None:
            self._forecaster = Forecaster(policy.forecast, scheduler)

    def at(self, index: int, latents: Latents) -> Latents:
        """Return it for the step at `index` of the schedule."""
        step = index - self._start
        if self._policy is None:
            return self._transformer.run(step, latents)
        self.action = self._policy.before(step, latents)
        if self.action == "conditional" and not self._transformer.is_guided:
            self.action = "run"
        self.error = None
        if step == 0 and self.action != "run":
            raise CvxError(f"the step policy says {self.action!r} of the first step", fix="let it say 'run'")
        if self.action == "forecast":
            return self._forecaster.output(index, latents)
        if self.action == "run":
            output = seen = self._transformer.run(step, latents)
        else:
            seen = self._transformer.run_conditional(step, latents)
            output = self._forecaster.completed(index, seen, latents)
        self.error = self._forecaster.error(index, seen, latents)
        self._forecaster.add(index, seen, latents)
        self._policy.after(step, latents, output)
        return output
