"""What clients send and what they get: OpenAI's fields, and those of the Python API beside them."""

import base64
import binascii
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

import msgspec

from cvx_deploy.serve.faults import ApiError
from cvx_deploy.serve.jobs import Job
from cvx_deploy.terminal import safe

_DATA_URL = re.compile(r"data:image/[a-z+.-]{1,20};base64,", re.IGNORECASE)
_LONG = 1 << 16  # characters of a field that is no prompt


class Asked(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A video that is asked for; see docs/serving.md."""

    prompt: str
    model: str | None = None
    seconds: str | float | None = None
    size: str | None = None
    num_frames: int | None = None
    fps: Annotated[int, msgspec.Meta(ge=1, le=120)] | None = None
    negative_prompt: str = ""
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    seed: int | None = None
    strength: float | None = None
    cache: Literal["fixed", "adaptive"] | None = None


class Edited(Asked, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A video that is to be made from another one; `video` names one of the client's own by ``{"id": ...}``."""

    video: dict[str, str] | None = None


class Extended(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What follows a video that is there: `seconds` more of it; see docs/serving.md."""

    prompt: str
    seconds: str | float
    model: str | None = None
    video: dict[str, str] | None = None
    negative_prompt: str = ""
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    seed: int | None = None


class Remixed(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Another prompt for a video that is there, and another seed where one is given."""

    prompt: str
    seed: int | None = None


Form = TypeVar("Form", Asked, Edited, Extended, Remixed)


def parsed(form: type[Form], fields: Mapping[str, Any], *, texts: bool) -> Form:
    """Return what some fields say.

    Args:
        form: What they are to be.
        fields: By name; all of them text where they come from a multipart form.
        texts: Whether they do.

    Raises:
        ApiError: A field is unknown, missing, or of another type.
    """
    try:
        return msgspec.convert(dict(fields), form, strict=not texts)
    except (msgspec.ValidationError, RecursionError, UnicodeError) as error:
        known = ", ".join(form.__struct_fields__)
        found = re.search(r"`\$\.(\w+)", str(error))
        message = f"{safe(error, 300)}. fix: these fields are known: {known}."
        raise ApiError(400, message, "invalid_value", None if found is None else found[1]) from error


def decoded_json(content: bytes) -> dict[str, Any]:
    """Return the object that a body holds.

    Raises:
        ApiError: It holds none.
    """
    try:
        found = msgspec.json.decode(content)
    except (msgspec.DecodeError, RecursionError, UnicodeError) as error:
        raise ApiError(
            400, f"the body is not JSON: {safe(error, 200)}. fix: send one object.", "invalid_json"
        ) from error
    if not isinstance(found, dict):
        raise ApiError(400, "the body is JSON, but no object. fix: send one, with a prompt.", "invalid_json")
    return found


def image_of(reference: Any) -> bytes:
    """Return the bytes of an image that stands in JSON, as ``{"image_url": "data:image/png;base64,..."}``.

    Raises:
        ApiError: It is another thing; addresses are not fetched.
    """
    url = reference.get("image_url") if isinstance(reference, dict) else reference
    start = _DATA_URL.match(url) if isinstance(url, str) else None
    if start is None:
        raise ApiError(
            400,
            "input_reference is no image: addresses and file ids are not fetched. fix: send the file in a multipart "
            'form, or {"image_url": "data:image/png;base64,..."}.',
            "invalid_value",
            "input_reference",
        )
    try:
        return base64.b64decode(str(url)[start.end() :], validate=True)
    except (binascii.Error, ValueError) as error:
        raise ApiError(
            400, "input_reference is not base64. fix: encode it anew.", "invalid_value", "input_reference"
        ) from error


def video_object(job: Job, progress: int, ahead: int | None = None) -> dict[str, Any]:
    """Return a job as OpenAI describes a video; what this service adds comes last.

    Args:
        job: It.
        progress: Percent, where it is running.
        ahead: How many jobs wait before it, where it waits.
    """
    spec, ended = job.spec, job.ended
    failed = job.status == "failed"
    return {
        "id": job.id,
        "object": "video",
        "created_at": int(job.created),
        "completed_at": int(ended) if ended is not None and job.status == "completed" else None,
        "expires_at": None if job.expires is None else int(job.expires),
        "status": job.status,
        "model": spec.model,
        "progress": 100 if job.status == "completed" else min(progress, 99),
        "prompt": spec.prompt,
        "seconds": seconds_of(spec.written, spec.fps),
        "size": f"{spec.width}x{spec.height}",
        "error": {"code": job.error_code, "message": job.error_message} if failed else None,
        "remixed_from_video_id": job.remixed_from,
        "seed": spec.seed,
        "num_frames": spec.written,
        "fps": spec.fps,
        "interpolated_frames": spec.interpolated,
        "image_model": spec.image_model,
        "num_inference_steps": spec.steps,
        "guidance_scale": spec.guidance_scale,
        "negative_prompt": spec.negative_prompt,
        "jobs_ahead": ahead,
    }


def seconds_of(frames: int, fps: int) -> str:
    """Return how long a video is, as OpenAI writes it."""
    return f"{frames / fps:.6g}"
