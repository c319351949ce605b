"""What stands before every route: how long a body may be, where a browser's request may come from, plain headers."""

import json
import time
from collections.abc import Awaitable, Callable
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cvx_deploy.serve.faults import ApiError
from cvx_deploy.serve.settings import is_loopback

_POLICY = (
    "default-src 'self'; img-src 'self' data: blob:; media-src 'self' blob:; object-src 'none'; base-uri 'none'; "
    "form-action 'self'; frame-ancestors 'none'"
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


Noting = Callable[[str, int, float], object]
"""Takes a route's pattern, the status of an answer, and the seconds to its end."""


class Guard:
    """Refuses what no route should see.

    Args:
        app: The routes.
        longest: Bytes of a body.
        note: Told of every answer.
        only_loopback: Whether the server takes requests without a key: then a page of another site, which a browser on
            this machine shows, must not reach it under a name of its own.
    """

    def __init__(self, app: ASGIApp, longest: int, note: Noting, *, only_loopback: bool) -> None:
        self._app, self._longest, self._note, self._only_loopback = app, longest, note, only_loopback

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status = time.monotonic(), 0

        async def answered(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        refusal = self._refusal(Headers(scope=scope))
        if refusal is not None:
            await _answer(refusal, answered)
        else:
            await self._app(scope, self._counted(receive), answered)
        self._note(getattr(scope.get("route"), "path", "other"), status, time.monotonic() - start)

    def _refusal(self, headers: Headers) -> ApiError | None:
        host = headers.get("host", "")
        if self._only_loopback and not is_loopback(urlsplit(f"//{host}").hostname or ""):
            return ApiError(403, "this server answers under localhost alone. fix: use that name.", "wrong_host")
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != host:
            return ApiError(403, "requests from pages of other sites are refused.", "foreign_origin")
        length = headers.get("content-length", "0")
        if not length.isascii() or not length.isdecimal() or int(length[:20]) > self._longest:
            return self._too_long()
        return None

    def _too_long(self) -> ApiError:
        return ApiError(413, f"the body is too long. fix: send {self._longest:,} bytes at most.", "body_too_long")

    def _counted(self, receive: Receive) -> Callable[[], Awaitable[Message]]:
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self._longest:
                raise self._too_long()
            return message

        return counted


async def _answer(error: ApiError, send: Send) -> None:
    content = json.dumps(error.body).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": content})
