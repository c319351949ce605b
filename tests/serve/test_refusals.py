"""Malformed requests: each is refused in OpenAI's form, with a way to mend it, and leaves nothing."""

import base64
import io
import json
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.serve.conftest import PROMPT, Still


def picture(width: int = 64, height: int = 48) -> bytes:
    content = io.BytesIO()
    Image.fromarray(np.zeros((height, width, 3), np.uint8)).save(content, "PNG")
    return content.getvalue()


GOOD = {"prompt": PROMPT}
FIELDS: list[dict[str, Any]] = [
    *(
        {**GOOD, "size": size}
        for size in ("64x64", "48", "x", "48x48x48", "-48x-48", "0x0", "48X48", "1e9x1e9", " 48x48")
    ),
    *({**GOOD, "seconds": seconds} for seconds in ("4000", "0", "-1", "nan", "inf", "x", "", "1e400", 6000, 1e300)),
    *({**GOOD, "num_frames": count} for count in (0, -1, 4900, 10**30, 1.5, "9", [9])),
    *({**GOOD, "fps": fps} for fps in (0, -1, 1000, "8", 1.5)),
    *({**GOOD, "num_inference_steps": steps} for steps in (0, -1, 501, 10**30, "4", 1.5)),
    *({**GOOD, "guidance_scale": scale} for scale in (-1, 1e9, "2", [2])),
    *({**GOOD, "seed": seed} for seed in (2**64, -(2**63) - 1, 1.5, "7", True)),
    *({**GOOD, "cache": cache} for cache in ("none", "", 1, {"fixed": 1})),
    *({**GOOD, "strength": strength} for strength in (0, 0.5, 2, "x")),
    *({"prompt": prompt} for prompt in ("", "  ", 7, None, [PROMPT], {"text": PROMPT}, "a" * 4001)),
    *({**GOOD, "model": name} for name in ("sora-2", "", "../mini", "mini/../../x", 7)),
    *({**GOOD, name: 1} for name in ("steps", "user", "__proto__", "n", "output", "lora")),
    *({**GOOD, "negative_prompt": text} for text in ("a" * 4001, 7)),
    *(
        {**GOOD, "model": "mini-i2v", "input_reference": reference}
        for reference in (
            "http://127.0.0.1:1/x.png",
            "file:///etc/passwd",
            {"image_url": "https://example.com/x.png"},
            {"file_id": "file-1"},
            {"image_url": "data:image/png;base64,###"},
            {"image_url": "data:image/png;base64,aGVsbG8="},
            {"image_url": "data:text/html;base64,aGVsbG8="},
            7,
        )
    ),
    {**GOOD, "model": "mini-i2v"},
    {**GOOD, "cache": "fixed", "num_inference_steps": 3},
    {},
]
BODIES: list[tuple[bytes, str]] = [
    (b"", "application/json"),
    (b"{", "application/json"),
    (b"[" * 100_000, "application/json"),
    (b'{"prompt":' * 10_000, "application/json"),
    (b"[1]", "application/json"),
    (b'"text"', "application/json"),
    (b"\xff\xfe", "application/json"),
    (b'{"prompt": "\\ud800"}', "application/json"),
    (b'{"prompt": NaN}', "application/json"),
    (b"prompt=a", "text/plain"),
    (b"<prompt/>", "application/xml"),
    (b"nothing", "multipart/form-data"),
    (b"nothing", "multipart/form-data; boundary="),
    (b"--x\r\nbroken\r\n--x--", "multipart/form-data; boundary=x"),
    (b"prompt=a&prompt=b", "application/x-www-form-urlencoded"),
    (b"&".join(b"f%d=1" % number for number in range(100)), "application/x-www-form-urlencoded"),
]


def check_refused(answer: Any, still: Still) -> None:
    assert 400 <= answer.status_code < 500, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert "Traceback" not in answer.text
    assert str(still.data) not in answer.text, "no path of the server is told"
    assert still.store.counts()["queued"] == 0
    assert list((still.data / "videos").iterdir()) == []
    assert not list(still.data.glob(".upload-*"))


def test_there_are_a_hundred_and_more() -> None:
    assert len(FIELDS) + len(BODIES) >= 100


def test_fields_that_make_no_sense_are_refused(still: Still) -> None:
    for fields in FIELDS:
        answer = still.client.post("/v1/videos", json=fields)
        check_refused(answer, still)
        assert ". fix: " in answer.json()["error"]["message"], answer.text
        assert "--" not in answer.json()["error"]["message"], "fields are named, not the command line's options"


def test_bodies_that_make_no_sense_are_refused(still: Still) -> None:
    for body, kind in BODIES:
        check_refused(still.client.post("/v1/videos", content=body, headers={"Content-Type": kind}), still)


def test_the_twin_a_request_that_makes_sense_is_taken(still: Still) -> None:
    answer = still.client.post("/v1/videos", json=GOOD)
    assert answer.status_code == 200
    assert still.store.counts()["queued"] == 1
    form = still.client.post("/v1/videos", data={**GOOD, "num_frames": "9", "seed": "7"}, files={})
    assert form.json()["seed"] == 7


@pytest.mark.parametrize(
    "content",
    [b"", b"hello", picture()[:60], b"%!PS-Adobe", b"#!/bin/sh\n", b"#EXTM3U\nfile:///etc/passwd"],
)
def test_files_that_are_no_images_are_refused(still: Still, content: bytes) -> None:
    files = {"input_reference": ("../../evil.png", content, "image/png")}
    check_refused(still.client.post("/v1/videos", data={**GOOD, "model": "mini-i2v"}, files=files), still)
    files = {"video": ("x.mp4", content, "video/mp4")}
    check_refused(still.client.post("/v1/videos/edits", data=GOOD, files=files), still)


def test_an_image_of_too_many_pixels_is_refused_before_it_is_decoded(still: Still) -> None:
    content = io.BytesIO()
    Image.new("1", (8192, 8192)).save(content, "PNG")
    files = {"input_reference": ("a.png", content.getvalue(), "image/png")}
    answer = still.client.post("/v1/videos", data={**GOOD, "model": "mini-i2v"}, files=files)
    check_refused(answer, still)
    assert "8192x8192" in answer.json()["error"]["message"]


def test_an_image_that_is_one_is_taken_in_a_form_and_in_json(still: Still) -> None:
    fields = {**GOOD, "model": "mini-i2v"}
    sent = still.client.post("/v1/videos", data=fields, files={"input_reference": ("../../a", picture(), "image/png")})
    url = "data:image/png;base64," + base64.b64encode(picture()).decode()
    again = still.client.post("/v1/videos", json={**fields, "input_reference": {"image_url": url}})
    assert (sent.status_code, again.status_code) == (200, 200)
    names = {path.name for path in still.data.rglob("*") if path.is_file()}
    assert names == {"source.npy", "jobs.sqlite", "jobs.sqlite-wal", "jobs.sqlite-shm"}


def test_a_body_that_is_too_long_is_refused_however_it_comes(still: Still) -> None:
    long = b"x" * (still.settings.limits.body + 1)
    assert still.client.post("/v1/videos", content=long).status_code == 413
    pieces = (long[start : start + (1 << 20)] for start in range(0, len(long), 1 << 20))
    answer = still.client.post("/v1/videos", content=pieces, headers={"Content-Type": "application/json"})
    assert answer.status_code == 413
    check_refused(answer, still)


@pytest.mark.parametrize(
    "identifier",
    ["video_0", "..%2f..%2fetc%2fpasswd", "video_" + "0" * 32, "%00", "a" * 5000, "' OR 1=1 --", "*", "characters"],
)
def test_ids_that_nobody_gave_out_are_not_found(still: Still, identifier: str) -> None:
    for method, end in (("GET", ""), ("DELETE", ""), ("GET", "/content"), ("POST", "/cancel"), ("GET", "/events")):
        answer = still.client.request(method, f"/v1/videos/{identifier}{end}")
        assert answer.status_code in (404, 405), (method, end)
        check_refused(answer, still)
    check_refused(still.client.post(f"/v1/videos/{identifier}/remix", json=GOOD), still)
    check_refused(still.client.get("/v1/videos", params={"after": identifier}), still)


@pytest.mark.parametrize("query", ["limit=0", "limit=101", "limit=x", "order=up", "after="])
def test_a_query_that_makes_no_sense_is_refused(still: Still, query: str) -> None:
    check_refused(still.client.get(f"/v1/videos?{query}"), still)


def test_headers_are_not_trusted(still: Still) -> None:
    for headers, status in (
        ({"Host": "evil.example"}, 403),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Idempotency-Key": "a" * 256}, 400),
        ({"Content-Length": "-1"}, 413),
        ({"Content-Length": "9" * 5000}, 413),
    ):
        answer = still.client.post("/v1/videos", json=GOOD, headers=headers)
        assert answer.status_code == status, headers
        check_refused(answer, still)
    own = still.client.get("/v1/models", headers={"Origin": "http://localhost"})
    assert own.status_code == 200
    assert "access-control-allow-origin" not in own.headers
    assert "default-src 'self'" in own.headers["content-security-policy"]


def test_a_full_queue_tells_when_to_come_again(still: Still) -> None:
    limits = still.settings.limits
    object.__setattr__(limits, "queue", 2)
    answers = [still.client.post("/v1/videos", json=GOOD) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    assert answers[2].headers["retry-after"] == "10"
    assert answers[2].json()["error"]["type"] == "rate_limit_error"
    object.__setattr__(limits, "queue", 100)
    object.__setattr__(limits, "jobs_per_key", 2)
    assert "you have 2 jobs" in still.client.post("/v1/videos", json=GOOD).json()["error"]["message"]


def test_who_waits_is_told_when_to_look_again(still: Still, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = [still.client.post("/v1/videos", json=GOOD) for _ in range(3)]
    still.store.claim()
    still.store.complete(jobs[0].json()["id"], 1)
    monkeypatch.setattr(still.store, "mean_seconds", lambda: 3.0)
    told = [still.client.get(f"/v1/videos/{job.json()['id']}").headers["openai-poll-after-ms"] for job in jobs]
    assert told == ["500", "500", "3000"], "an ended one, the next one, and the one after it"
    monkeypatch.setattr(still.store, "mean_seconds", lambda: 300.0)
    assert still.client.get(f"/v1/videos/{jobs[2].json()['id']}").headers["openai-poll-after-ms"] == "10000"


def test_a_fault_of_ours_is_told_without_its_traceback(still: Still, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise ZeroDivisionError("secret")

    monkeypatch.setattr(still.service, "models", broken)
    answer = still.client.get("/v1/models")
    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == "internal_error"
    assert "secret" not in answer.text


def test_what_an_unsupported_size_says_is_what_there_is(still: Still) -> None:
    error = still.client.post("/v1/videos", json={**GOOD, "size": "720x1280"}).json()["error"]
    assert error["message"] == "this model makes no such videos. fix: use 48x48 of 1.125 s (9 frames)."
    assert error["param"] == "size"
    [model, _] = still.client.get("/v1/models").json()["data"]
    assert model["sizes"] == [{"size": "48x48", "num_frames": 9, "fps": 8, "seconds": "1.125"}]
    assert json.loads(still.client.get("/v1/models/mini").text) == model
