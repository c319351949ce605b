"""From what a client asks for to a complete job, or to the reason why it cannot be made; no pixel is looked at."""

import secrets
from collections.abc import Iterator
from contextlib import contextmanager

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

_NEAR = 0.5  # seconds by which what is asked for may miss a video's length: 6 is the 49 frames at 8 a second


def spec_of(asked: Asked, name: str, bundle: Bundle, source: Source | None, limits: Limits) -> Spec:
    """Return the complete job: the bundle's defaults filled in, a seed drawn where none is given.

    Args:
        asked: What a client asks for.
        name: Of the model, and `bundle` what makes it.
        source: What it starts from beside its prompt.
        limits: What a client may ask for.

    Raises:
        ApiError: The bundle cannot make it, or it is beyond the limits.
    """
    _check_texts(asked, limits)
    defaults, shape = bundle.manifest.defaults, wanted_shape(asked, bundle)
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
        frames=shape.frames,
        height=shape.height,
        width=shape.width,
        fps=asked.fps or bundle.manifest.fps,
        steps=steps,
        guidance_scale=defaults.guidance_scale if asked.guidance_scale is None else asked.guidance_scale,
        seed=secrets.randbits(32) if asked.seed is None else asked.seed,
        strength=asked.strength,
        cache=asked.cache,
        source=source,
    )
    with stating():
        _check(bundle.at(shape), spec)
    return spec


@contextmanager
def stating() -> Iterator[None]:
    """Answer a stated failure of the block as one of the request."""
    try:
        yield
    except CvxError as error:
        raise refused(error) from error


def wanted_shape(asked: Asked, bundle: Bundle) -> Shape:
    """Return which of a bundle's shapes is asked for.

    Raises:
        ApiError: It makes none such; says which it makes.
    """
    fps = asked.fps or bundle.manifest.fps
    seconds = None if asked.seconds is None else _seconds(asked.seconds)

    def fits(shape: Shape) -> bool:
        return (
            (asked.size is None or asked.size == size_of(shape))
            and (asked.num_frames is None or asked.num_frames == shape.frames)
            and (seconds is None or abs(shape.frames / fps - seconds) <= _NEAR)
        )

    found = [shape for shape in bundle.shapes if fits(shape)]
    if not found:
        made = ", ".join(
            f"{size_of(one)} of {seconds_of(one.frames, fps)} s ({one.frames} frames)" for one in bundle.shapes
        )
        param = "size" if asked.size is not None else "seconds" if seconds is not None else "num_frames"
        raise ApiError(400, f"this model makes no such videos. fix: use {made}.", "unsupported_size", param)
    return min(found, key=lambda shape: 0.0 if seconds is None else abs(shape.frames / fps - seconds))


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
