"""A request's body as fields and one file, whether it is JSON or a multipart form."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
from fastapi import Request
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException

from cvx_deploy.serve.faults import ApiError
from cvx_deploy.serve.jobs import Source
from cvx_deploy.serve.schemas import decoded_json, image_of
from cvx_deploy.serve.service import Upload

_MOST_FIELDS = 40
_LONGEST_FIELD = 1 << 16


@dataclass(frozen=True)
class Body:
    """What a request says.

    Attributes:
        fields: By name; `texts` where all are text, as a form has them.
        upload: The file that came along.
    """

    fields: dict[str, Any]
    texts: bool
    upload: Upload | None = None


async def body_of(request: Request, files: Mapping[str, Source]) -> Body:
    """Read a body.

    Args:
        request: What came.
        files: The field that may be a file, and what of.

    Raises:
        ApiError: It is neither JSON nor a form, or damaged.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind in ("multipart/form-data", "application/x-www-form-urlencoded"):
        return await _form(request, files)
    if kind not in ("application/json", ""):
        raise ApiError(
            415, "the body is neither JSON nor a multipart form. fix: send one of them.", "unsupported_media_type"
        )
    fields = decoded_json(await request.body())
    reference = fields.pop("input_reference", None) if "input_reference" in files else None
    upload = None if reference is None else Upload("image", image_of(reference))
    return Body(fields, False, upload)


async def _form(request: Request, files: Mapping[str, Source]) -> Body:
    fields: dict[str, Any] = {}
    upload: Upload | None = None
    try:
        form = request.form(max_files=1, max_fields=_MOST_FIELDS, max_part_size=_LONGEST_FIELD)
        async with form as parts:
            for name, value in parts.multi_items():
                if isinstance(value, UploadFile):
                    if name not in files:
                        raise ApiError(400, "a file came in a field that is none.", "invalid_value")
                    upload = Upload(files[name], await value.read())
                elif name in fields:
                    raise ApiError(400, "a field came twice. fix: send it once.", "invalid_value")
                else:
                    fields[name] = value
    except (MultiPartException, KeyError, ValueError, AssertionError) as error:
        raise ApiError(400, "the form is damaged. fix: send it anew.", "invalid_form") from error
    reference = fields.pop("input_reference", None)
    if reference is not None and upload is None:
        upload = Upload("image", image_of(_object(reference)))
    for name in [name for name in fields if name.startswith("input_reference[")]:  # an object, as clients flatten it
        upload = Upload("image", image_of({name[len("input_reference[") : -1]: fields.pop(name)}))
    if "video[id]" in fields:
        fields["video"] = {"id": fields.pop("video[id]")}
    elif isinstance(fields.get("video"), str):
        fields["video"] = _object(fields["video"])
    return Body(fields, True, upload)


def _object(text: str) -> Any:
    """Return what JSON in a form's field says, or the text itself."""
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError, UnicodeError):
        return text
