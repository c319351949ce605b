"""The same server with its workers on the nodes of a Ray cluster, of which one is killed in the middle of a video."""

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from cvx_deploy.miniatures import miniature
from cvx_deploy.pipeline.pipeline import Pipeline
from tests.cluster.nodes import Nodes
from tests.command import cvx
from tests.serve.conftest import PROMPT
from tests.serve.conftest import until as until_within

pytest.importorskip("ray")

STEPS = 80
until = partial(until_within, patience=300)
"""A cluster is a dozen processes beside those that are tested."""


class Served:
    """A server on a cluster."""

    def __init__(self, nodes: Nodes, data: Path, *words: str) -> None:
        self.data = data
        command = ("-m", "cvx_deploy", "serve", "--port", "0", "--data", str(data), "--ray", nodes.address, *words)
        self.process = subprocess.Popen(
            [sys.executable, *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=nodes.environment | {"COLUMNS": "200"},
        )
        assert self.process.stderr is not None
        self.said: list[str] = []
        for line in self.process.stderr:
            self.said.append(line)
            if "listening on " in line:
                break
        assert "listening on " in self.said[-1], self.said
        self.url = self.said[-1].split()[-1]
        threading.Thread(target=self._drain, daemon=True).start()

    def _drain(self) -> None:
        assert self.process.stderr is not None
        self.said.extend(self.process.stderr)

    def workers(self) -> list[str]:
        found: list[str] = httpx.get(f"{self.url}/readyz").json()["workers"]
        return found

    def create(self, **fields: Any) -> str:
        asked = {"prompt": PROMPT, "num_inference_steps": STEPS, "seed": 7, **fields}
        return str(httpx.post(f"{self.url}/v1/videos", json=asked).json()["id"])

    def shown(self, video: str) -> dict[str, Any]:
        values: dict[str, Any] = httpx.get(f"{self.url}/v1/videos/{video}").json()
        return values

    def content(self, video: str) -> bytes:
        until(lambda: self.shown(video)["status"] not in ("queued", "in_progress"))
        assert self.shown(video)["status"] == "completed", (self.shown(video), self.said)
        return httpx.get(f"{self.url}/v1/videos/{video}/content").content

    def kinds(self, video: str, seen: list[tuple[str, dict[str, Any]]]) -> None:
        with httpx.stream("GET", f"{self.url}/v1/videos/{video}/events", timeout=300) as stream:
            for line in stream.iter_lines():
                if line.startswith("event: "):
                    kind = line.removeprefix("event: ")
                elif line.startswith("data: "):
                    seen.append((kind, json.loads(line.removeprefix("data: "))))


@contextmanager
def served(data: Path, *words: str) -> Iterator[tuple[Nodes, Served]]:
    with Nodes() as nodes:
        server = Served(nodes, data, *words)
        try:
            until(lambda: all(state in ("ready", "busy") for state in server.workers()))
            yield nodes, server
        finally:
            if server.process.poll() is None:
                server.process.send_signal(signal.SIGTERM)
            server.process.wait(60)
            assert server.process.stdout is not None
            out = server.process.stdout.read()
    assert out == "", "what Ray says is not on stdout"
    assert "Traceback" not in "".join(server.said)


@pytest.mark.nightly
def test_a_node_that_dies_costs_its_job_nothing(tmp_path: Path) -> None:
    with Pipeline.from_bundle(miniature("mini"), threads=1) as pipe:
        [alone] = pipe(PROMPT, seed=7, num_inference_steps=STEPS).save(tmp_path / "alone.mp4")
    with served(tmp_path / "data", "--threads", "1") as (nodes, server):
        assert len(server.workers()) == 2, "one for each node that has a CPU"
        videos = [server.create(), server.create()]
        seen: list[list[tuple[str, dict[str, Any]]]] = [[], []]
        listeners = [threading.Thread(target=server.kinds, args=pair) for pair in zip(videos, seen, strict=True)]
        for listener in listeners:
            listener.start()
        until(lambda: all(list(server.data.glob(f"videos/{video}/point-*.npz")) for video in videos))
        nodes.kill()
        assert [server.content(video) for video in videos] == [alone.read_bytes()] * 2
        for listener in listeners:
            listener.join(30)
        kinds = [[kind for kind, _ in one] for one in seen]
        assert [one.count("completed") for one in kinds] == [1, 1]
        [resumed] = [dict(one)["resumed"] for one in seen if "resumed" in dict(one)]
        assert resumed["taken"] >= 5, "it went on where it stood"
        assert server.content(server.create(seed=8)) != alone.read_bytes(), "the twin: another seed is another video"
        cancelled = server.create(num_inference_steps=500)
        until(lambda: server.shown(cancelled)["progress"] > 0)
        httpx.post(f"{server.url}/v1/videos/{cancelled}/cancel")
        until(lambda: server.shown(cancelled)["status"] == "cancelled")
        left = {path.name for path in server.data.glob("videos/*/*") if path.parent.name != cancelled}
        assert left == {"video.mp4", "thumbnail.jpg", "spritesheet.png"}


@pytest.mark.nightly
def test_a_node_that_joins_gets_a_worker_and_a_server_that_ends_keeps_its_points(tmp_path: Path) -> None:
    with served(tmp_path / "data", "--threads", "1") as (nodes, server):
        nodes.kill()
        until(lambda: sorted(server.workers()) == ["ready", "starting"])
        nodes.add()
        until(lambda: server.workers() == ["ready", "ready"])
        video = server.create(num_inference_steps=400)
        until(lambda: server.shown(video)["progress"] > 0)
        server.process.send_signal(signal.SIGTERM)
        server.process.wait(60)
        assert list((tmp_path / "data" / "videos" / video).glob("point-*.npz")), "where it stood is kept"


@pytest.mark.nightly
def test_a_job_that_starts_from_a_picture_takes_it_along(tmp_path: Path) -> None:
    import base64

    from cvx_deploy.media.read import load_image

    picture = Path(__file__).parent / "../../docs/page.webp"
    assert load_image(picture, 48, 48).shape[-1] == 48
    data = "data:image/webp;base64," + base64.b64encode(picture.read_bytes()).decode()
    with served(tmp_path / "data", "--threads", "1", "--model", "mini-i2v") as (_, server):
        video = server.create(num_inference_steps=4, input_reference={"image_url": data})
        assert server.content(video) == server.content(
            server.create(num_inference_steps=4, input_reference={"image_url": data})
        )


def test_devices_mean_nothing_with_ray(tmp_path: Path) -> None:
    words = ("--data", tmp_path, "--engine", "onnxruntime-cuda", "--devices", "0", "--ray", "127.0.0.1:1")
    outcome = cvx("serve", *words)
    assert outcome.code == 2
    assert "--devices means nothing with --ray" in outcome.err


def test_a_cluster_that_is_not_there_is_stated(tmp_path: Path) -> None:
    failure = cvx("serve", "--data", tmp_path / "data", "--ray", "127.0.0.1:1").failure()
    assert "no Ray cluster answers at 127.0.0.1:1" in failure
    assert not (tmp_path / "data").exists()
    assert cvx("serve", "--data", tmp_path / "data", "--ray", "nowhere").code == 2
