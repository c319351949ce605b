"""A Hugging Face hub on loopback: one repository, as much of the API as a download uses, and every way it fails."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = (".safetensors", ".bin", ".model")


@dataclass(frozen=True)
class Request:
    """What was asked of the hub; `file` is None where it was the list of files, and `cdn` tells the second host."""

    method: str
    file: str | None
    cdn: bool
    range: str | None
    token: str | None


@dataclass
class StubHub:
    """The repository that is served, how it misbehaves, and what was asked.

    Attributes:
        root: The folder whose files it serves.
        revisions: The names of its one commit.
        alter: File to what is served in place of its content, at the same size.
        cut: File to how many bytes of each response come before the connection is dropped; the last holds from then on.
        stalled: Large files do not come until this is set.
        refuse: The status and error code that every request for a file gets, such as (403, "GatedRepo").
        refuse_list: Likewise of requests for the list of files.
        ranges: Whether it knows of ranges.
        commit: What the list of files says that its commit is.
        requests: All that was asked.
    """

    root: Path
    repository: str = "zai-org/CogVideoX-5b"
    revisions: tuple[str, ...] = ("main", "v1", COMMIT)
    alter: dict[str, bytes] = field(default_factory=dict)
    cut: dict[str, list[int]] = field(default_factory=dict)
    stalled: threading.Event | None = None
    refuse: tuple[int, str] | None = None
    refuse_list: tuple[int, str] | None = None
    ranges: bool = True
    commit: str = COMMIT
    requests: list[Request] = field(default_factory=list)
    port: int = 0

    @property
    def endpoint(self) -> str:
        """Return what HF_ENDPOINT is to be."""
        return f"http://127.0.0.1:{self.port}"

    def served(self) -> list[str]:
        """Return the files whose content was asked for."""
        asked = {request.file for request in self.requests if request.method == "GET" and request.file}
        return sorted(asked)

    def etag(self, file: str) -> str:
        """Return the SHA-256 of a large file, git's hash of a small one."""
        data = (self.root / file).read_bytes()
        if file.endswith(LARGE):
            return hashlib.sha256(data).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    def listed(self) -> dict[str, object]:
        """Return what the model's API says."""
        files = (path.relative_to(self.root).as_posix() for path in sorted(self.root.rglob("*")) if path.is_file())
        return {"id": self.repository, "sha": self.commit, "siblings": [self._listed(file) for file in files]}

    def _listed(self, file: str) -> dict[str, object]:
        size, etag = (self.root / file).stat().st_size, self.etag(file)
        if not file.endswith(LARGE):
            return {"rfilename": file, "size": size, "blobId": etag}
        lfs = {"sha256": etag, "size": size, "pointerSize": 134}
        return {"rfilename": file, "size": size, "blobId": "0" * 40, "lfs": lfs}


class _Handler(BaseHTTPRequestHandler):
    hub: ClassVar[StubHub]
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Keep the tests' output clean."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        repository = self.hub.repository
        if path.startswith("cdn/"):
            self._content(path.removeprefix("cdn/"), cdn=True)
        elif path.startswith(f"api/models/{repository}"):
            self._list(path.removeprefix(f"api/models/{repository}").removeprefix("/revision/") or "main")
        elif path.startswith(f"{repository}/resolve/"):
            revision, _, file = path.removeprefix(f"{repository}/resolve/").partition("/")
            self._resolve(revision, file)
        else:
            self._refuse(404, "RepoNotFound")

    def _note(self, file: str | None, *, cdn: bool = False) -> None:
        token = self.headers.get("Authorization")
        self.hub.requests.append(Request(self.command, file, cdn, self.headers.get("Range"), token))

    def _list(self, revision: str) -> None:
        self._note(None)
        if self.hub.refuse_list:
            self._refuse(*self.hub.refuse_list)
        elif revision not in self.hub.revisions:
            self._refuse(404, "RevisionNotFound")
        else:
            self._reply(200, {"Content-Type": "application/json"}, json.dumps(self.hub.listed()).encode())

    def _resolve(self, revision: str, file: str) -> None:
        if self.hub.refuse:
            self._refuse(*self.hub.refuse)
        elif revision not in self.hub.revisions or not (self.hub.root / file).is_file():
            self._refuse(404, "EntryNotFound")
        elif file.endswith(LARGE):
            self._note(file)
            size = (self.hub.root / file).stat().st_size
            linked = {"X-Linked-Etag": f'"{self.hub.etag(file)}"', "X-Linked-Size": str(size)}
            # another host, as the real one's storage is
            self._reply(302, {"Location": f"http://localhost:{self.hub.port}/cdn/{file}", **linked}, b"")
        else:
            self._content(file)

    def _content(self, file: str, *, cdn: bool = False) -> None:
        self._note(file, cdn=cdn)
        if cdn and self.hub.stalled is not None:
            self.hub.stalled.wait(60)
        data = self.hub.alter.get(file) or (self.hub.root / file).read_bytes()
        asked = self.headers.get("Range")
        first = int(asked.removeprefix("bytes=").rstrip("-")) if asked and self.hub.ranges else 0
        headers = {"ETag": f'"{self.hub.etag(file)}"'}
        if first:
            headers["Content-Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
        cuts = self.hub.cut.get(file)
        cut = None if not cuts or self.command == "HEAD" else cuts.pop(0) if len(cuts) > 1 else cuts[0]
        self._reply(206 if first else 200, headers, data[first:], cut)

    def _refuse(self, status: int, code: str) -> None:
        self._reply(status, {"X-Error-Code": code} if code else {}, b"")

    def _reply(self, status: int, headers: dict[str, str], body: bytes, cut: int | None = None) -> None:
        self.send_response(status)
        for name, value in {**headers, "X-Repo-Commit": COMMIT, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:cut])
        self.close_connection = self.close_connection or cut is not None


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """Say nothing of a client that has gone."""


@contextmanager
def serving(hub: StubHub) -> Iterator[StubHub]:
    """Serve a hub on a free port of loopback for the block."""
    handler = type("Handler", (_Handler,), {"hub": hub})
    with _Server(("127.0.0.1", 0), handler) as server:
        hub.port = server.server_port
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        try:
            yield hub
        finally:
            server.shutdown()
