"""The two CogVideoX samplers, DDIM and the stochastic DPM-Solver++ (2M), in NumPy on the host.

Both agree with diffusers' ``CogVideoXDDIMScheduler`` and ``CogVideoXDPMScheduler`` to 1e-5 at every step, quirks
included: a step aims at ``t - num_train_timesteps // num_inference_steps``, which is not always the next timestep, and
DPM draws noise that it does not use. In half precision they round where torch does on a CPU: the latents after each
step, a coefficient that they or noise are multiplied by, and the product; what the transformer says, and what clean
latents it stands for, stay in float32. What a config may also hold and those two never read (``clip_sample`` and its
kin) has no effect here either.

Names: ``alpha`` is the cumulative product that papers write with a bar (diffusers' ``alphas_cumprod``), at the timestep
a step starts from; ``alpha_prev`` is the same at the timestep it goes to.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from cvx_deploy.bounds import LARGEST_FACTOR, MOST_STEPS
from cvx_deploy.errors import CheckpointError, CvxError
from cvx_deploy.families.cogvideox.models import SchedulerKind
from cvx_deploy.pipeline.noise import Generator
from cvx_deploy.pipeline.rounding import rounded
from cvx_deploy.precision import Precision
from cvx_deploy.terminal import safe

Latents = NDArray[np.float32]  # of any shape: the samplers work value by value

_CHOICES: dict[str, tuple[str, ...]] = {
    "beta_schedule": ("scaled_linear", "linear"),
    "prediction_type": ("v_prediction", "epsilon", "sample"),
    "timestep_spacing": ("trailing", "leading", "linspace"),
}
_CLASSES = ("CogVideoXDDIMScheduler", "CogVideoXDPMScheduler")


def _refuse(key: str, value: object, wanted: str) -> CheckpointError:
    return CheckpointError(
        f"scheduler config: {key} is {safe(repr(value), 100)}, not {wanted}",
        fix=f"use the scheduler_config.json of a CogVideoX checkpoint, or mend its {key}",
    )


@dataclass(frozen=True)
class SchedulerConfig:
    """What a diffusers ``scheduler_config.json`` says, with diffusers' own defaults for what it leaves out.

    Attributes:
        num_train_timesteps: Timesteps the model was trained with.
        beta_start: First noise variance; `beta_end` the last, `beta_schedule` how they are joined.
        set_alpha_to_one: The last step goes to a clean sample, rather than to timestep 0.
        steps_offset: Added to every timestep of ``leading`` spacing.
        prediction_type: What the transformer predicts.
        timestep_spacing: How inference steps are spread over the training timesteps.
        rescale_betas_zero_snr: The last training timestep is pure noise.
        snr_shift_scale: How far the signal-to-noise ratio is shifted down; 1 is not at all.

    Raises:
        CheckpointError: A value is of the wrong type or out of range; the message names its key.
    """

    num_train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.0120
    beta_schedule: Literal["scaled_linear", "linear"] = "scaled_linear"
    set_alpha_to_one: bool = True
    steps_offset: int = 0
    prediction_type: Literal["v_prediction", "epsilon", "sample"] = "epsilon"
    timestep_spacing: Literal["trailing", "leading", "linspace"] = "leading"
    rescale_betas_zero_snr: bool = False
    snr_shift_scale: float = 3.0

    def __post_init__(self) -> None:
        for field in fields(self):
            _check_type(field.name, getattr(self, field.name), type(field.default))
        for key, sane, wanted in (
            ("num_train_timesteps", 1 <= self.num_train_timesteps <= MOST_STEPS, f"from 1 to {MOST_STEPS}"),
            ("beta_start", 0 < self.beta_start < 1, "between 0 and 1"),
            ("beta_end", 0 < self.beta_end < 1, "between 0 and 1"),
            ("steps_offset", 0 <= self.steps_offset < self.num_train_timesteps, "a training timestep"),
            ("snr_shift_scale", 0 < self.snr_shift_scale <= LARGEST_FACTOR, f"above 0 and at most {LARGEST_FACTOR:g}"),
        ):
            if not sane:
                raise _refuse(key, getattr(self, key), wanted)
        with np.errstate(all="ignore"):
            alphas = alphas_cumprod(self)
        if not np.all((alphas >= 0) & (alphas < 1)):  # a NaN fails this too
            raise CheckpointError(
                f"scheduler config: num_train_timesteps {self.num_train_timesteps}, beta_start {self.beta_start}, "
                f"beta_end {self.beta_end} and snr_shift_scale {self.snr_shift_scale} make no noise schedule together",
                fix="use the scheduler_config.json of a CogVideoX checkpoint",
            )

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "SchedulerConfig":
        """Read a diffusers ``scheduler_config.json``; keys that the CogVideoX schedulers do not know are left alone.

        Raises:
            CheckpointError: The config asks for what is not supported; the message names the key.
        """
        if config.get("_class_name", _CLASSES[0]) not in _CLASSES:
            raise _refuse("_class_name", config["_class_name"], " or ".join(_CLASSES))
        if config.get("trained_betas") is not None:
            raise _refuse("trained_betas", config["trained_betas"], "null (a list of betas is not supported)")
        return cls(**{field.name: config[field.name] for field in fields(cls) if field.name in config})


def _check_type(key: str, value: object, kind: type) -> None:
    choices = _CHOICES.get(key)
    if choices is not None:
        if value not in choices:
            raise _refuse(key, value, " or ".join(choices))
    elif type(value) is not kind and not (kind is float and type(value) is int):
        raise _refuse(key, value, f"of type {kind.__name__}")


def alphas_cumprod(config: SchedulerConfig) -> NDArray[np.floating[Any]]:
    """Return how much of the signal's variance is left at each training timestep, in diffusers' own precision.

    That is float64 for ``scaled_linear`` betas and float32 for ``linear`` ones. The shift is Stable Diffusion 3's
    (arXiv 2403.03206), the rescaling Algorithm 1 of arXiv 2305.08891.
    """
    steps = config.num_train_timesteps
    if config.beta_schedule == "linear":
        betas = np.linspace(config.beta_start, config.beta_end, steps).astype(np.float32)
    else:
        betas = np.linspace(config.beta_start**0.5, config.beta_end**0.5, steps) ** 2
    alphas = np.cumprod(1 - betas, dtype=np.float64).astype(betas.dtype)
    alphas = alphas / (config.snr_shift_scale + (1 - config.snr_shift_scale) * alphas)
    if config.rescale_betas_zero_snr:
        roots = np.sqrt(alphas)
        alphas = ((roots - roots[-1]) * (roots[0] / (roots[0] - roots[-1]))) ** 2
    return alphas


def _spaced(config: SchedulerConfig, count: int) -> NDArray[np.int64]:
    """Spread `count` steps over the training timesteps, descending (table 2 of arXiv 2305.08891)."""
    total = config.num_train_timesteps
    if config.timestep_spacing == "linspace":
        return np.linspace(0, total - 1, count).round().astype(np.int64)[::-1].copy()
    if config.timestep_spacing == "leading":
        return np.arange(count, dtype=np.int64)[::-1] * (total // count) + config.steps_offset
    return np.arange(total, 0, -total / count).round().astype(np.int64) - 1


def _usable(timesteps: NDArray[np.int64], config: SchedulerConfig) -> bool:
    inside = timesteps[-1] >= 0 and timesteps[0] < config.num_train_timesteps
    return bool(inside and np.all(np.diff(timesteps) < 0))


def timesteps_for(config: SchedulerConfig, num_inference_steps: int) -> NDArray[np.int64]:
    """Return the timesteps of a run, descending.

    Raises:
        CvxError: `num_inference_steps` is not between 1 and the training timesteps, or is one of the counts for which
            diffusers leaves the schedule: with trailing spacing its rounding adds a step at timestep -1 (61 of 1000
            does), which would denoise the finished video once more as if it were pure noise.
    """
    total = config.num_train_timesteps
    if not 1 <= num_inference_steps <= total:
        raise CvxError(f"{num_inference_steps} steps: the model has {total}", fix=f"use --steps between 1 and {total}")
    timesteps = _spaced(config, num_inference_steps)
    if not _usable(timesteps, config):
        nearby = sorted(range(1, total + 1), key=lambda count: abs(count - num_inference_steps))
        nearest = next(count for count in nearby if _usable(_spaced(config, count), config))
        raise CvxError(
            f"{num_inference_steps} steps: {config.timestep_spacing} spacing leaves the timesteps 0 to {total - 1}",
            fix=f"use --steps {nearest}",
        )
    return timesteps


def _float32(coefficients: NDArray[np.floating[Any]]) -> list[np.float32]:
    """Round as torch does when it multiplies a float32 tensor by a float64 scalar."""
    return list(coefficients.astype(np.float32))


class Scheduler(ABC):
    """One run from noise to latents: the sampler asks `step` for every position from `start` on, in order.

    Args:
        config: The checkpoint's noise schedule.
        num_inference_steps: Steps of the whole schedule.
        start: The position in `timesteps` of the first step taken; above 0 for video-to-video, which starts from a
            video made noisy with `add_noise` at that position.
        kept: The type that latents are kept in.

    Attributes:
        timesteps: The training timestep of every step, descending, int64.
        draws_noise: Whether steps add noise that they draw.
        previous_original: The clean latents that the last step foretold, where the next one looks back at them.

    Raises:
        CvxError: The schedule has no such number of steps, or no such `start`.
        CheckpointError: The model predicts noise, but the first step is at pure noise, where that says nothing.
    """

    draws_noise: ClassVar[bool] = False
    _pull: list[np.float32]  # what the clean latents are multiplied by in each step

    def __init__(
        self, config: SchedulerConfig, num_inference_steps: int, start: int = 0, kept: Precision = "fp32"
    ) -> None:
        self.timesteps = timesteps_for(config, num_inference_steps)
        if not 0 <= start < len(self.timesteps):
            raise CvxError(
                f"step {start} of {len(self.timesteps)} is no place to start", fix="raise --steps or --strength"
            )
        self.start, self._kept = start, kept
        self.previous_original: Latents | None = None
        self._prediction_type = config.prediction_type
        alphas = alphas_cumprod(config)
        previous = self.timesteps - config.num_train_timesteps // num_inference_steps
        self._past_zero = previous < 0
        self._alpha = alphas[self.timesteps]
        final = 1.0 if config.set_alpha_to_one else alphas[0]
        self._alpha_prev = np.where(self._past_zero, final, alphas[np.maximum(previous, 0)]).astype(alphas.dtype)
        self._signal, self._noise = _float32(np.sqrt(self._alpha)), _float32(np.sqrt(1 - self._alpha))
        if config.prediction_type == "epsilon" and self._alpha[start] == 0:
            raise CheckpointError(
                f"scheduler config: prediction_type is 'epsilon', but timestep {self.timesteps[start]} is pure noise",
                fix="use a checkpoint whose prediction_type is v_prediction, or a timestep_spacing of leading",
            )

    @property
    def influence(self) -> NDArray[np.float64]:
        """What an error of each step's clean latents counts for in the finished video, (steps,), by experience.

        A step moves the latents by a share of the clean ones; later steps mend a part of what earlier ones did wrong,
        but a video's content is decided early. The square root of that share lies between the two, and masks found with
        it came nearest to the full run; see docs/step-cache.md.
        """
        return np.sqrt(np.array(self._pull, np.float64))

    @abstractmethod
    def step(self, index: int, model_output: Latents, latents: Latents, generator: Generator) -> Latents:
        """Take the step at position `index` of `timesteps` and return the less noisy latents.

        All three arrays are float32 of one shape. What a sampler draws comes from `generator`.
        """

    def add_noise(self, original: Latents, noise: Latents, index: int) -> Latents:
        """Mix clean latents with noise as the step at `index` expects them, in the type they are kept in throughout."""
        alpha = self._rounded(self._alpha[index])
        signal, share = self._rounded(np.sqrt(alpha)), self._rounded(np.sqrt(self._rounded(1 - alpha)))
        return self._rounded(self._rounded(signal * original) + self._rounded(share * noise))

    def original(self, index: int, model_output: Latents, latents: Latents) -> Latents:
        """Say what clean latents the model's output stands for (equation 12 of arXiv 2010.02502)."""
        signal, noise = self._signal[index], self._noise[index]
        if self._prediction_type == "v_prediction":
            original: Latents = self._times(signal, latents) - noise * model_output
        elif self._prediction_type == "epsilon":
            original = np.divide(latents - noise * model_output, signal)
        else:
            original = model_output
        return original

    def output_of(self, index: int, original: Latents, latents: Latents) -> Latents:
        """Say what output of the model stands for clean latents: the inverse of `original`."""
        signal, noise = self._signal[index], self._noise[index]
        if self._prediction_type == "v_prediction":
            output: Latents = np.divide(signal * latents - original, noise)
        elif self._prediction_type == "epsilon":
            output = np.divide(latents - signal * original, noise)
        else:
            output = original
        return output

    def _rounded(self, values: Any) -> Latents:
        return rounded(values, self._kept)

    def _times(self, coefficient: np.float32, values: Latents) -> Latents:
        """Multiply latents, or noise, as torch multiplies a tensor of one number by one in half precision."""
        return self._rounded(self._rounded(coefficient) * values)


class DDIMScheduler(Scheduler):
    """The deterministic sampler of arXiv 2010.02502; draws nothing."""

    def __init__(
        self, config: SchedulerConfig, num_inference_steps: int, start: int = 0, kept: Precision = "fp32"
    ) -> None:
        super().__init__(config, num_inference_steps, start, kept)
        keep = np.sqrt((1 - self._alpha_prev) / (1 - self._alpha))
        self._keep = _float32(keep)
        self._pull = _float32(np.sqrt(self._alpha_prev) - np.sqrt(self._alpha) * keep)

    def step(self, index: int, model_output: Latents, latents: Latents, generator: Generator) -> Latents:
        """Take the step at position `index` of `timesteps`; `generator` is left as it is."""
        original = self.original(index, model_output, latents)
        return self._rounded(self._times(self._keep[index], latents) + self._pull[index] * original)


class DPMScheduler(Scheduler):
    """The stochastic DPM-Solver++ (2M) of arXiv 2211.01095; each step but the first and the last also looks back one.

    It draws noise of the latents' shape once in a step that does not look back and twice in one that does, as diffusers
    does, which draws for a first-order result before it makes the second-order one.
    """

    draws_noise = True

    def __init__(
        self, config: SchedulerConfig, num_inference_steps: int, start: int = 0, kept: Precision = "fp32"
    ) -> None:
        super().__init__(config, num_inference_steps, start, kept)
        alpha, alpha_prev = self._alpha, self._alpha_prev
        # Pure noise has a log SNR of -inf and a clean sample +inf; the limits that follow from them are meant.
        with np.errstate(divide="ignore", invalid="ignore"):
            log_snr = np.log(np.sqrt(alpha / (1 - alpha)))
            stride = np.log(np.sqrt(alpha_prev / (1 - alpha_prev))) - log_snr
            blend = 1 / (2 * (np.diff(log_snr, prepend=np.nan) / stride))
        keep = np.sqrt((1 - alpha_prev) / (1 - alpha)) * np.exp(-stride)
        sigma = np.sqrt(1 - alpha_prev) * np.sqrt(1 - np.exp(-2 * stride))
        self._keep, self._sigma = _float32(keep), _float32(sigma)
        self._pull = _float32(-np.expm1(-2 * stride) * np.sqrt(alpha_prev))
        self._ahead, self._behind = _float32(1 + blend), _float32(blend)

    def step(self, index: int, model_output: Latents, latents: Latents, generator: Generator) -> Latents:
        """Take the step at position `index` of `timesteps`, drawing once or twice from `generator`."""
        original = self.original(index, model_output, latents)
        before = self.previous_original if index > self.start else None
        self.previous_original = original
        noise = generator.randn(latents.shape)
        if before is not None and not self._past_zero[index]:
            noise = generator.randn(latents.shape)
            original = self._ahead[index] * original - self._behind[index] * before
        kept, drawn = self._times(self._keep[index], latents), self._times(self._sigma[index], noise)
        return self._rounded(kept + self._pull[index] * original + drawn)


SCHEDULERS: dict[SchedulerKind, type[Scheduler]] = {"ddim": DDIMScheduler, "dpm": DPMScheduler}


def make_scheduler(
    kind: SchedulerKind, config: SchedulerConfig, num_inference_steps: int, start: int = 0, kept: Precision = "fp32"
) -> Scheduler:
    """Make the scheduler that `kind` names; the arguments and errors are those of `Scheduler`."""
    return SCHEDULERS[kind](config, num_inference_steps, start, kept)


def dynamic_guidance_scale(guidance_scale: float, num_inference_steps: int, timestep: int) -> float:
    """Return the guidance scale of one step under ``use_dynamic_cfg`` of diffusers' CogVideoX pipelines.

    The formula takes the timestep (0 to 999) where one would expect the step, so the scale swings rather than rises.
    `num_inference_steps` counts the steps actually run: in video-to-video, those left after `strength`.
    """
    progress = (num_inference_steps - timestep) / num_inference_steps
    return 1 + guidance_scale * (1 - math.cos(math.pi * progress**5.0)) / 2
