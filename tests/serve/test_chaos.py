"""Workers and servers that are killed: every job ends once, with the bytes of an undisturbed one."""

import errno
import json
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from cvx_deploy.bundle.opened import Bundle
from cvx_deploy.errors import CvxError, OutputError
from cvx_deploy.miniatures import miniature
from cvx_deploy.progress import SilentProgress
from cvx_deploy.serve.server import serve
from cvx_deploy.serve.settings import ServeSettings
from tests.serve.conftest import PROMPT, Server, until

LONG: dict[str, Any] = {"prompt": PROMPT, "num_inference_steps": 25, "seed": 7}


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(tmp_path_factory.mktemp("chaos")) as running:
        running.wait_ready()
        yield running


def worker_of(server: Server) -> int:
    [worker] = psutil.Process(server.process.pid).children()
    return worker.pid


def create(server: Server, **fields: Any) -> str:
    return str(httpx.post(f"{server.url}/v1/videos", json={**LONG, **fields}).json()["id"])


def shown(server: Server, video: str) -> dict[str, Any]:
    values: dict[str, Any] = httpx.get(f"{server.url}/v1/videos/{video}").json()
    return values


def content(server: Server, video: str) -> bytes:
    until(lambda: shown(server, video)["status"] not in ("queued", "in_progress"))
    assert shown(server, video)["status"] == "completed", shown(server, video)
    return httpx.get(f"{server.url}/v1/videos/{video}/content").content


def events_until_the_end(server: Server, video: str, seen: list[tuple[str, dict[str, Any]]]) -> None:
    with httpx.stream("GET", f"{server.url}/v1/videos/{video}/events", timeout=90) as stream:
        kind = ""
        for line in stream.iter_lines():
            if line.startswith("event: "):
                kind = line.removeprefix("event: ")
            elif line.startswith("data: "):
                seen.append((kind, json.loads(line.removeprefix("data: "))))


def test_a_worker_that_is_killed_costs_its_job_nothing(own: Server) -> None:
    undisturbed = content(own, create(own))
    video = create(own)
    seen: list[tuple[str, dict[str, Any]]] = []
    listener = threading.Thread(target=events_until_the_end, args=(own, video, seen))
    listener.start()
    until(lambda: any(kind == "step" and values["index"] >= 6 for kind, values in seen))
    os.kill(worker_of(own), signal.SIGKILL)
    assert content(own, video) == undisturbed
    listener.join(10)
    kinds = [kind for kind, _ in seen]
    assert kinds.count("completed") == 1
    at = kinds.index("resumed")
    assert seen[at][1]["taken"] >= 5, "it went on where it stood"
    assert seen[at + 1][1]["index"] == seen[at][1]["taken"], "and did not begin anew"
    assert content(own, create(own, seed=8)) != undisturbed, "the twin: another seed is another video"


@pytest.mark.nightly
def test_a_job_that_kills_its_worker_twice_fails_with_the_reason(own: Server) -> None:
    video = create(own, num_inference_steps=500, cache="fixed")  # no points are saved of such a one
    for _ in range(2):
        until(lambda: shown(own, video)["progress"] > 0 and shown(own, video)["status"] == "in_progress")
        os.kill(worker_of(own), signal.SIGKILL)
        until(lambda: shown(own, video)["status"] != "in_progress")
    until(lambda: shown(own, video)["status"] == "failed")
    assert shown(own, video)["error"]["code"] == "worker_died"
    assert content(own, create(own, num_inference_steps=2)), "the server goes on"


def test_a_server_that_is_killed_loses_nothing(own: Server) -> None:
    undisturbed = content(own, create(own, seed=3))
    running, waiting = create(own, seed=3), create(own, seed=3)
    cancelled = create(own)
    httpx.post(f"{own.url}/v1/videos/{cancelled}/cancel")
    until(lambda: shown(own, running)["progress"] > 30)
    worker = worker_of(own)
    own.kill()
    until(lambda: not psutil.pid_exists(worker))
    (own.data / "videos" / ("video_" + "0" * 32)).mkdir()  # of a job that was never taken in
    own.start()
    assert [content(own, video) for video in (running, waiting)] == [undisturbed] * 2
    assert shown(own, cancelled)["status"] == "cancelled"
    known = {video["id"] for video in httpx.get(f"{own.url}/v1/videos?limit=100").json()["data"]}
    assert {path.name for path in (own.data / "videos").iterdir()} <= known
    assert not list(own.data.rglob("point-*")), "a finished video has no point any more"


def test_a_server_that_is_told_to_end_lets_its_jobs_wait_for_the_next(tmp_path: Path) -> None:
    with Server(tmp_path) as server:
        video = create(server, num_inference_steps=30)
        until(lambda: shown(server, video)["progress"] > 0)
        code, said = server.stop()
        assert code == -signal.SIGTERM, said
        assert "Traceback" not in said
        assert list((tmp_path / "videos" / video).glob("point-*.npz")), "where it stood is kept"
        server.start()
        first = content(server, video)
        assert first == content(server, create(server, num_inference_steps=30))


class Noting(SilentProgress):
    """Keeps the notes."""

    def __init__(self) -> None:
        super().__init__()
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        """Keep it."""
        self.notes.append(text)


def test_a_server_whose_workers_cannot_come_up_ends_with_the_reason(tmp_path: Path) -> None:
    shutil.copytree(miniature("mini"), tmp_path / "mini")
    settings = ServeSettings({"mini": Bundle.open(tmp_path / "mini")}, tmp_path / "data", port=0)
    (tmp_path / "mini" / "tokenizer.json").write_text("{}")
    progress = Noting()
    with pytest.raises(CvxError, match=r"tokenizer\.json"):
        serve(settings, progress)
    assert [note.partition(" http")[0] for note in progress.notes] == ["listening on"], "nothing of a new start"
    assert not (tmp_path / "data").exists(), "what the server made goes with it"
    kept = tmp_path / "data" / "kept"
    kept.parent.mkdir()
    kept.touch()
    with pytest.raises(CvxError, match=r"tokenizer\.json"):
        serve(settings, progress)
    assert kept.exists(), "the twin: what was there stays"


def test_a_worker_that_cannot_even_be_started_ends_the_server_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    settings = ServeSettings({"mini": Bundle.open(miniature("mini"))}, tmp_path / "data", port=0)
    monkeypatch.setattr("cvx_deploy.serve.process.subprocess.Popen", refused)
    with pytest.raises(CvxError, match="no worker can be started: Permission denied"):
        serve(settings, SilentProgress())


def test_one_server_at_a_time_has_a_folder(own: Server) -> None:
    settings = ServeSettings({"mini": Bundle.open(miniature("mini"))}, own.data, port=0)
    with pytest.raises(OutputError, match="another server has"):
        serve(settings, SilentProgress())


@pytest.mark.nightly
def test_a_worker_that_hangs_is_killed_and_its_job_goes_on(tmp_path: Path) -> None:
    with Server(tmp_path, patience=20) as server:
        video = create(server)
        until(lambda: shown(server, video)["progress"] > 0)
        os.kill(worker_of(server), signal.SIGSTOP)
        assert content(server, video) == content(server, create(server))
