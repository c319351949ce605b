"""From what a client asks for to a complete job, or to the reason why it cannot be made; no pixel is looked at."""

import math
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cvx_deploy.bundle.opened import Bundle
from cvx_deploy.errors import CvxError, ShapeError
from cvx_deploy.pipeline.request import RunRequest
from cvx_deploy.pipeline.run import check_schedule, check_task
from cvx_deploy.serve.faults import ApiError, refused
from cvx_deploy.serve.jobs import Source, Spec
from cvx_deploy.serve.schemas import Asked, seconds_of
from cvx_deploy.serve.settings import Limits
from cvx_deploy.shape import Shape

_LEFT_OPEN = ("num_inference_steps", "guidance_scale")
_NEAR = 0.5  # seconds by which what is asked for may miss a video's length: 6 is the 49 frames at 8 a second


@dataclass(frozen=True)
class Continued:
    """A video that is continued: its file, frames, frames a second, and size; and the job that made it."""

    path: Path
    frames: int
    fps: int
    size: str
    job: str | None = None


def spec_of(
    asked: Asked,
    name: str,
    models: Mapping[str, Bundle],
    source: Source | None,
    limits: Limits,
    continued: Continued | None = None,
) -> Spec:
    """Return the complete job: the bundle's defaults filled in, a seed drawn where none is given.

    Args:
        asked: What a client asks for.
        name: Of the model, which is one of `models`.
        models: What the server has, by name.
        source: What it starts from beside its prompt.
        limits: What a client may ask for.
        continued: The video that it continues.

    Raises:
        ApiError: The bundle cannot make it, or it is beyond the limits.
    """
    _check_texts(asked, limits)
    bundle = models[name]
    defaults, made_fps = bundle.manifest.defaults, bundle.manifest.fps
    if continued is None:
        shape, frames, image_model = wanted_video(asked, name, models, limits)
    else:
        shape, frames, image_model = bundle.shapes[0], *_following(asked, name, models, limits, continued)
    steps = defaults.steps if asked.num_inference_steps is None else asked.num_inference_steps
    if not 1 <= steps <= limits.steps:
        message = f"{steps} steps. fix: use 1 to {limits.steps}."
        raise ApiError(400, message, "invalid_value", "num_inference_steps")
    if asked.strength is not None and source != "video":
        message = "strength means nothing without a video. fix: leave it out."
        raise ApiError(400, message, "invalid_value", "strength")
    spec = Spec(
        model=name,
        prompt=asked.prompt,
        negative_prompt=asked.negative_prompt,
        frames=frames,
        height=shape.height,
        width=shape.width,
        fps=asked.fps or made_fps,
        steps=steps,
        guidance_scale=defaults.guidance_scale if asked.guidance_scale is None else asked.guidance_scale,
        seed=secrets.randbits(32) if asked.seed is None else asked.seed,
        strength=asked.strength,
        cache=asked.cache,
        source=source,
        made_fps=made_fps,
        image_model=image_model,
        left_open=tuple(name for name in _LEFT_OPEN if getattr(asked, name) is None),
        extends=0 if continued is None else continued.frames,
    )
    with stating():
        _ = spec.rate
        _check(bundle.at(shape), spec)
    return spec


@contextmanager
def stating() -> Iterator[None]:
    """Answer a stated failure of the block as one of the request."""
    try:
        yield
    except CvxError as error:
        raise refused(error) from error


def wanted_video(
    asked: Asked, name: str, models: Mapping[str, Bundle], limits: Limits
) -> tuple[Shape, int, str | None]:
    """Return which of a bundle's shapes is asked for, how many frames, and what makes the clips after the first.

    Raises:
        ApiError: It makes none such; says which it makes.
    """
    bundle = models[name]
    fps = bundle.manifest.fps
    seconds = None if asked.seconds is None else _seconds(asked.seconds)

    def fits(shape: Shape) -> bool:
        return (
            (asked.size is None or asked.size == size_of(shape))
            and (asked.num_frames is None or asked.num_frames == shape.frames)
            and (seconds is None or abs(shape.frames / fps - seconds) <= _NEAR)
        )

    found = [shape for shape in bundle.shapes if fits(shape)]
    if not found:
        first = bundle.shapes[0]
        frames = asked.num_frames if seconds is None else _count(seconds, fps, limits)
        if asked.size in (None, size_of(first)) and frames is not None and first.frames < frames <= limits.frames:
            image_model = goes_on(name, models)
            if image_model is not None:
                return first, frames, image_model
        made = ", ".join(
            f"{size_of(one)} of {seconds_of(one.frames, fps)} s ({one.frames} frames)" for one in bundle.shapes
        )
        param = "size" if asked.size is not None else "seconds" if seconds is not None else "num_frames"
        raise ApiError(400, f"this model makes no such videos. fix: use {made}.", "unsupported_size", param)
    shape = min(found, key=lambda shape: 0.0 if seconds is None else abs(shape.frames / fps - seconds))
    return shape, shape.frames, None


def goes_on(name: str, models: Mapping[str, Bundle]) -> str | None:
    """Return the model that makes clips from frames of a model's; None where there is none."""
    bundle = models[name]

    def fits(other: Bundle) -> bool:
        sides = [(one.shapes[0].height, one.shapes[0].width, one.manifest.fps) for one in (bundle, other)]
        return other.manifest.traits.task == "image-to-video" and sides[0] == sides[1]

    return next((other for other in (name, *models) if fits(models[other])), None)


def _following(
    asked: Asked, name: str, models: Mapping[str, Bundle], limits: Limits, continued: Continued
) -> tuple[int, str]:
    """Return how many frames are to follow a video, and what makes them."""
    image_model = goes_on(name, models)
    if image_model is None:
        message = f"no model here goes on from a frame of {name}. fix: serve an image-to-video model of its size, too."
        raise ApiError(400, message, "unsupported")
    made = size_of(models[name].shapes[0])
    if continued.size != made:
        message = f"that video is {continued.size}. fix: extend one of {made}."
        raise ApiError(400, message, "unsupported_size", "video")
    fps = models[name].manifest.fps
    frames = _count(_seconds(asked.seconds or 0), fps, limits)
    if continued.frames * fps // continued.fps + frames > limits.frames:
        raise ApiError(400, f"more than {limits.frames} frames in all. fix: extend it by less.", "too_long", "seconds")
    return frames, image_model


def _count(seconds: float, fps: int, limits: Limits) -> int:
    """Return the frames of so many seconds."""
    frames = round(seconds * fps) if math.isfinite(seconds) else 0
    if not 0 < frames <= limits.frames:
        message = f"{seconds:g} s. fix: use {1 / fps:g} to {limits.frames / fps:g}."
        raise ApiError(400, message, "invalid_value", "seconds")
    return frames


def size_of(shape: Shape) -> str:
    """Return a size as OpenAI writes it."""
    return f"{shape.width}x{shape.height}"


def _seconds(value: str | float) -> float:
    try:
        return float(value)
    except ValueError as error:
        raise ApiError(400, 'seconds is no number. fix: send one, such as "6".', "invalid_value", "seconds") from error


def _check(bundle: Bundle, spec: Spec) -> None:
    """Refuse what the pipeline would refuse once it runs; sources stand in as empty pixels."""
    empty = np.empty(0, np.float32)
    request = RunRequest(
        (spec.prompt,),
        negative_prompt=spec.negative_prompt,
        image=empty if spec.source == "image" else None,
        video=empty if spec.source == "video" else None,
        strength=0.8 if spec.strength is None else spec.strength,
        steps=spec.steps,
        guidance_scale=spec.guidance_scale,
        seed=spec.seed,
        cache=spec.cache,
    )
    if spec.source != "extension":
        check_task(bundle, request)
    check_schedule(bundle, request)
    if bundle.shape.height % 2 or bundle.shape.width % 2:
        raise ShapeError(f"{bundle.shape} has odd sides", fix="use another size")


def _check_texts(asked: Asked, limits: Limits) -> None:
    for name, text in (("prompt", asked.prompt), ("negative_prompt", asked.negative_prompt)):
        if len(text) > limits.prompt:
            message = f"{name} has {len(text)} characters. fix: use {limits.prompt} at most."
            raise ApiError(400, message, "string_too_long", name)
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ApiError(400, f"{name} is not Unicode. fix: send UTF-8.", "invalid_value", name) from error
    if not asked.prompt.strip():
        raise ApiError(400, "prompt is empty. fix: say what is to be seen.", "invalid_value", "prompt")
