"""Videos beyond a clip, at another rate, and continued, over HTTP: those of the Python API, and bounded."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest

from cvx_deploy import Pipeline
from cvx_deploy.longer.chain import Chain
from cvx_deploy.longer.write import LongRequest, write_long
from cvx_deploy.media.encoders import as_bytes
from cvx_deploy.pipeline.events import Frames
from cvx_deploy.serve.files import JobFiles
from tests.media.test_write import psnr, read
from tests.serve.conftest import PROMPT, Server, Still

pytestmark = pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")
FEW: dict[str, Any] = {"num_inference_steps": 2, "seed": 7}
LEFT = "a red circle moves to the left"
POLL = 100
LOSSY = 30.0
"""Least PSNR in dB of a video that was encoded twice."""


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def chain() -> Iterator[Chain]:
    with Pipeline.from_pretrained("mini", threads=1) as first, Pipeline.from_pretrained("mini-i2v", threads=1) as then:
        yield Chain(first, then)


def done(client: openai.OpenAI, video: Any) -> Any:
    return client.videos.poll(video.id, poll_interval_ms=POLL)


def test_a_longer_video_is_a_chain_to_the_byte(client: openai.OpenAI, chain: Chain, tmp_path: Path) -> None:
    more = {**FEW, "seconds": "2.5", "fps": 16}
    video = done(client, client.videos.create(prompt=PROMPT, model="mini", extra_body=more))
    assert (video.status, video.seconds) == ("completed", "2.4375")
    assert (video.num_frames, video.interpolated_frames, video.image_model) == (39, 19, "mini-i2v")
    write_long(chain, LongRequest((PROMPT,), 20, tmp_path / "own.mp4", 7, fps=16, how={"num_inference_steps": 2}))
    assert client.videos.download_content(video.id).read() == (tmp_path / "own.mp4").read_bytes()


def test_a_video_is_extended(client: openai.OpenAI, server: Server, chain: Chain, tmp_path: Path) -> None:
    first = done(client, client.videos.create(prompt=PROMPT, model="mini", extra_body=FEW))
    (tmp_path / "first.mp4").write_bytes(client.videos.download_content(first.id).read())
    more = {**FEW, "seconds": "1"}
    body = {"prompt": LEFT, "video": {"id": first.id}, **more}
    sent = client.post("/videos/extensions", body=body, cast_to=openai.types.Video)
    video = done(client, sent)
    assert (video.status, video.seconds, video.num_frames) == ("completed", "2.125", 17)
    (tmp_path / "whole.mp4").write_bytes(client.videos.download_content(video.id).read())
    there = read(tmp_path / "first.mp4")
    events = chain.stream(LEFT, num_frames=8, seed=7, continued=as_bytes(there), num_inference_steps=2)
    own = np.concatenate([there, *(event.frames for event in events if isinstance(event, Frames))])
    assert psnr(read(tmp_path / "whole.mp4"), own) > LOSSY
    content = (tmp_path / "first.mp4").read_bytes()
    by_file = client.videos.extend(prompt=LEFT, seconds="4", video=("x", content), extra_body=more)
    assert done(client, by_file).status == "completed"
    assert client.videos.download_content(by_file.id).read() == (tmp_path / "whole.mp4").read_bytes()
    assert not (server.data / "videos" / video.id / "source.mp4").exists()
    with pytest.raises(openai.BadRequestError, match="is not remixed"):
        client.videos.remix(video.id, prompt=PROMPT)


def test_twin_what_follows_another_video_is_another(chain: Chain) -> None:
    random = np.random.default_rng(0)
    ends = [random.integers(0, 255, (3, 48, 48, 3)).astype(np.uint8) for _ in range(2)]
    made = [
        [
            e.frames
            for e in chain.stream(PROMPT, num_frames=4, continued=end, num_inference_steps=2)
            if isinstance(e, Frames)
        ]
        for end in ends
    ]
    assert not np.array_equal(np.concatenate(made[0]), np.concatenate(made[1]))


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"seconds": "1e9"}, "use 0.125 to 125"),
    ({"seconds": "126"}, "use 0.125 to 125"),
    ({"num_frames": 1001}, "this model makes no such videos"),
    ({"seconds": "5", "size": "64x64"}, "this model makes no such videos"),
    ({"fps": 4}, "use fps 8 or more"),
]


@pytest.mark.parametrize(("more", "said"), REFUSED)
def test_what_is_too_long_is_refused(still: Still, more: dict[str, Any], said: str) -> None:
    answer = still.client.post("/v1/videos", json={"prompt": PROMPT, **more})
    assert answer.status_code == 400
    assert said in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"prompt": PROMPT, "seconds": "4"}, 400),
        ({"prompt": PROMPT, "seconds": "4", "video": {"id": "video_none"}}, 404),
        ({"prompt": PROMPT, "video": {"id": "video_none"}}, 400),
        ({"prompt": PROMPT, "seconds": "4", "video": {"id": "x"}, "model": "none"}, 404),
        ({"prompt": PROMPT, "seconds": "4", "video": {"id": "x"}, "size": "48x48"}, 400),
    ],
)
def test_an_extension_of_nothing_is_refused(still: Still, body: dict[str, Any], status: int) -> None:
    assert still.client.post("/v1/videos/extensions", json=body).status_code == status


@pytest.mark.parametrize("content", [b"", b"no video"])
def test_a_file_that_is_no_video_is_not_extended(still: Still, content: bytes) -> None:
    fields = {"prompt": PROMPT, "seconds": "4"}
    answer = still.client.post("/v1/videos/extensions", data=fields, files={"video": ("v.mp4", content)})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "video")
    assert str(still.data) not in answer.text
    assert not list(still.data.glob(".upload-*"))


def test_a_video_that_is_not_made_yet_and_an_extension_beyond_all_bounds_are_refused(still: Still) -> None:
    made = still.client.post("/v1/videos", json={"prompt": PROMPT}).json()["id"]
    body = {"prompt": PROMPT, "seconds": "4", "video": {"id": made}}
    assert "wait until it is completed" in still.client.post("/v1/videos/extensions", json=body).text
    still.store.claim()
    still.store.complete(made, 1)
    JobFiles(still.data / "videos" / made).folder.mkdir(parents=True, exist_ok=True)
    (still.data / "videos" / made / "video.mp4").write_bytes(b"a video")
    assert still.client.post("/v1/videos/extensions", json=body).json()["num_frames"] == 41
    for seconds in ("0", "nan", "x", "124.5"):
        assert still.client.post("/v1/videos/extensions", json={**body, "seconds": seconds}).status_code == 400
