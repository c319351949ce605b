"""The official client against a server in a process of its own: the whole way, and the bytes of the Python API."""

import io
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import httpx
import numpy as np
import openai
import pytest
from openai.types import Video
from PIL import Image

from cvx_deploy import Pipeline
from tests.serve.conftest import PROMPT, Server, until

pytestmark = pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")
FEW: dict[str, Any] = {"num_inference_steps": 4, "seed": 7}
POLL = 100


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def pipe() -> Iterator[Pipeline]:
    with Pipeline.from_pretrained("mini", threads=1) as pipeline:
        yield pipeline


def saved(video: Any, path: Path) -> bytes:
    """Return the bytes of the file that a video of the Python API is saved as."""
    video.save(path)
    return path.read_bytes()


def done(client: openai.OpenAI, video: Any) -> Any:
    return client.videos.poll(video.id, poll_interval_ms=POLL)


def picture() -> bytes:
    pixels = np.random.default_rng(3).integers(0, 255, (60, 80, 3)).astype(np.uint8)
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    return content.getvalue()


def test_a_video_is_that_of_the_python_api_to_the_byte(client: openai.OpenAI, pipe: Pipeline, tmp_path: Path) -> None:
    video = client.videos.create_and_poll(
        prompt=PROMPT, model="mini", extra_body={**FEW, "seconds": "1", "size": "48x48"}, poll_interval_ms=POLL
    )
    assert (video.status, video.progress, video.seconds, video.size) == ("completed", 100, "1.125", "48x48")
    assert video.completed_at is not None
    assert video.expires_at is not None
    assert video.expires_at > video.completed_at >= video.created_at
    content = client.videos.download_content(video.id).read()
    assert content == saved(pipe(PROMPT, **FEW), tmp_path / "own.mp4")
    assert content != saved(pipe(PROMPT, **{**FEW, "seed": 8}), tmp_path / "twin.mp4")
    shown = Image.open(io.BytesIO(client.videos.download_content(video.id, variant="thumbnail").read()))
    sheet = Image.open(io.BytesIO(client.videos.download_content(video.id, variant="spritesheet").read()))
    assert (shown.format, shown.size) == ("JPEG", (48, 48))
    assert (sheet.format, sheet.height) == ("PNG", 48)


def test_a_part_of_a_file_can_be_asked_for(client: openai.OpenAI, server: Server) -> None:
    video = done(client, client.videos.create(prompt=PROMPT, extra_body=FEW))
    whole = client.videos.download_content(video.id).read()
    url = f"{server.url}/v1/videos/{video.id}/content"
    part = httpx.get(url, headers={"Range": "bytes=10-19"})
    assert (part.status_code, part.content) == (206, whole[10:20])
    assert part.headers["content-range"] == f"bytes 10-19/{len(whole)}"
    assert httpx.get(url, headers={"Range": f"bytes={len(whole)}-"}).status_code == 416
    [stream] = av.open(io.BytesIO(whole)).streams.video
    assert stream.frames == 9


def test_remix_list_and_delete(client: openai.OpenAI, pipe: Pipeline, tmp_path: Path) -> None:
    first = done(client, client.videos.create(prompt=PROMPT, extra_body=FEW))
    again = done(client, client.videos.remix(first.id, prompt="a blue square"))
    assert again.remixed_from_video_id == first.id
    expected = saved(pipe("a blue square", **FEW), tmp_path / "own.mp4")
    assert client.videos.download_content(again.id).read() == expected
    reseeded = done(client, client.videos.remix(first.id, prompt=PROMPT, extra_body={"seed": 8}))
    assert (reseeded.seed, reseeded.num_inference_steps) == (8, first.num_inference_steps)
    page = client.videos.list(limit=1)
    assert [video.id for video in page.data] == [reseeded.id]
    assert page.has_more
    assert next(iter(page.get_next_page())).id == again.id
    seen = [video.id for video in client.videos.list(order="asc", limit=2)]
    assert seen.index(first.id) < seen.index(again.id)
    assert client.videos.delete(first.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.videos.retrieve(first.id)
    assert client.videos.retrieve(again.id).status == "completed"


def test_an_image_starts_a_video(client: openai.OpenAI, tmp_path: Path) -> None:
    sent = client.videos.create(prompt=PROMPT, model="mini-i2v", input_reference=("a.png", picture()), extra_body=FEW)
    remixed = client.videos.remix(sent.id, prompt=PROMPT)
    (tmp_path / "a.png").write_bytes(picture())
    with Pipeline.from_pretrained("mini-i2v", threads=1) as pipeline:
        expected = saved(pipeline(PROMPT, image=tmp_path / "a.png", **FEW), tmp_path / "own.mp4")
    for video in (sent, remixed):
        assert done(client, video).status == "completed"
        assert client.videos.download_content(video.id).read() == expected


def test_a_video_is_edited(client: openai.OpenAI, pipe: Pipeline, tmp_path: Path) -> None:
    first = done(client, client.videos.create(prompt=PROMPT, extra_body=FEW))
    more = {**FEW, "strength": 0.5}
    edited = done(
        client,
        client.post(
            "/videos/edits", body={"prompt": "a blue square", "video": {"id": first.id}, **more}, cast_to=Video
        ),
    )
    (tmp_path / "first.mp4").write_bytes(client.videos.download_content(first.id).read())
    own = pipe("a blue square", video=tmp_path / "first.mp4", **more)
    assert client.videos.download_content(edited.id).read() == saved(own, tmp_path / "own.mp4")
    sent = client.videos.edit(
        prompt="a blue square", video=("x", (tmp_path / "first.mp4").read_bytes()), extra_body=more
    )
    assert done(client, sent).status == "completed"
    assert client.videos.download_content(sent.id).read() == (tmp_path / "own.mp4").read_bytes()


def test_the_same_idempotency_key_makes_one_video(client: openai.OpenAI) -> None:
    def ask(prompt: str) -> str:
        return client.videos.create(prompt=prompt, extra_body=FEW, extra_headers={"Idempotency-Key": "one"}).id

    assert ask(PROMPT) == ask(PROMPT)
    with pytest.raises(openai.BadRequestError, match="another request"):
        ask("a blue square")


def test_events_tell_every_step_and_the_frames_and_the_end(client: openai.OpenAI, server: Server) -> None:
    blocker = client.videos.create(prompt=PROMPT, extra_body={"num_inference_steps": 30})
    video = client.videos.create(prompt=PROMPT, extra_body=FEW)
    with httpx.stream("GET", f"{server.url}/v1/videos/{video.id}/events", timeout=60) as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        blocks = "".join(stream.iter_text()).strip().split("\n\n")
    told = [
        (lines[0].removeprefix("event: "), json.loads(lines[1].removeprefix("data: ")))
        for lines in (b.split("\n") for b in blocks if b.startswith("event"))
    ]
    kinds = [kind for kind, _ in told]
    assert kinds[0] == "queued"
    assert [kind for kind in kinds if kind != "saved"][1:] == ["in_progress", *["step"] * 4, "frames", "completed"]
    steps = [values for kind, values in told if kind == "step"]
    assert [(step["index"], step["count"]) for step in steps] == [(index, 4) for index in range(4)]
    frames = next(values for kind, values in told if kind == "frames")
    assert (frames["made"], frames["count"]) == (9, 9)
    assert frames["preview"].startswith("data:image/jpeg;base64,")
    assert done(client, blocker).status == "completed"


def test_a_cancelled_video_stops_at_once_and_the_next_one_runs(client: openai.OpenAI, server: Server) -> None:
    long = client.videos.create(prompt=PROMPT, extra_body={"num_inference_steps": 500})
    waiting = client.videos.create(prompt=PROMPT, extra_body={"num_inference_steps": 500})
    until(lambda: client.videos.retrieve(long.id).progress > 0)
    with pytest.raises(openai.BadRequestError, match="cancel it first"):
        client.videos.delete(long.id)
    for video in (waiting, long):
        client.post(f"/videos/{video.id}/cancel", cast_to=object)
    assert str(client.videos.retrieve(waiting.id).status) == "cancelled"
    started = time.monotonic()
    until(lambda: str(client.videos.retrieve(long.id).status) == "cancelled")
    assert time.monotonic() - started < 10, "500 steps would take longer"
    with pytest.raises(openai.BadRequestError, match="is cancelled"):
        client.videos.download_content(long.id)
    until(lambda: not list((server.data / "videos" / long.id).glob("*")))
    assert done(client, client.videos.create(prompt=PROMPT, extra_body=FEW)).status == "completed"


def test_a_video_can_be_waited_for(server: Server, pipe: Pipeline, tmp_path: Path) -> None:
    answer = httpx.post(f"{server.url}/v1/videos/sync", json={"prompt": PROMPT, **FEW}, timeout=60)
    assert answer.headers["content-type"] == "video/mp4"
    assert answer.content == saved(pipe(PROMPT, **FEW), tmp_path / "own.mp4")


def test_who_runs_it_sees_how_it_is(server: Server) -> None:
    assert httpx.get(f"{server.url}/healthz").json() == {"status": "ok"}
    assert httpx.get(f"{server.url}/readyz").json()["status"] == "ready"
    text = httpx.get(f"{server.url}/metrics").text
    assert 'cvx_jobs{status="failed"} 0.0' in text
    assert 'cvx_requests_total{route="/v1/videos' in text or 'cvx_requests_total{route="/readyz"' in text


@pytest.mark.nightly
def test_litellm_gets_the_same_video(
    server: Server, pipe: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # it would fetch a list of prices
    litellm = pytest.importorskip("litellm")
    options = {"custom_llm_provider": "openai", "api_base": f"{server.url}/v1", "api_key": "none"}
    video = litellm.video_generation(prompt=PROMPT, model="openai/mini", seconds="1", extra_body=FEW, **options)
    until(lambda: litellm.video_status(video.id, **options).status == "completed")
    content = litellm.video_content(video.id, **options)
    assert content == saved(pipe(PROMPT, **FEW), tmp_path / "own.mp4")
