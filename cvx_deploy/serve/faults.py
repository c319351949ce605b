"""What a client is told when something is wrong: OpenAI's form of it, with our way to mend it."""

import re
from typing import Any

from cvx_deploy.errors import CvxError
from cvx_deploy.terminal import safe

_PARAMETERS = {
    "prompt": "prompt",
    "steps": "num_inference_steps",
    "image": "input_reference",
    "frames": "num_frames",
    "shape": "size and num_frames",
    "video": "video",
}
_FLAG = re.compile(r"--([a-z]+(?:-[a-z]+)*)(?: (?:FILE|TEXT)\b)?")


class ApiError(Exception):
    """A refused request.

    Args:
        status: The HTTP status.
        message: What is wrong, and how to mend it.
        code: A word for programs.
        param: Which field is meant.
        retry_after: Seconds after which it makes sense to come again.
    """

    def __init__(
        self, status: int, message: str, code: str, param: str | None = None, retry_after: int | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, safe(message, 2000), code, param
        self.retry_after = retry_after

    @property
    def body(self) -> dict[str, Any]:
        """The answer."""
        kind = _KINDS.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """What goes with the answer."""
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        return headers | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})


_KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


def refused(error: CvxError) -> ApiError:
    """Return a stated failure as an answer, with the words of the command line turned into fields."""
    return ApiError(400, _fields(str(error)), code_of(error))


def code_of(error: CvxError) -> str:
    """Return the word for a kind of failure: ``ShapeError`` is ``shape_error``."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", type(error).__name__).lower()


def _fields(text: str) -> str:
    return _FLAG.sub(lambda found: _PARAMETERS.get(found[1], found[1].replace("-", "_")), text)
