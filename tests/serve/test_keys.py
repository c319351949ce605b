"""Keys: hashed in their file, asked for everywhere, and each with jobs of its own."""

import stat
from pathlib import Path

import pytest

from cvx_deploy.errors import CvxError
from cvx_deploy.serve.keys import KeyRing, add_key, read_keys
from tests.command import cvx
from tests.serve.conftest import PROMPT, Still

ROUTES = [
    ("POST", "/v1/videos"),
    ("POST", "/v1/videos/sync"),
    ("POST", "/v1/videos/edits"),
    ("POST", "/v1/videos/extensions"),
    ("GET", "/v1/videos"),
    ("GET", "/v1/videos/video_0"),
    ("DELETE", "/v1/videos/video_0"),
    ("GET", "/v1/videos/video_0/content"),
    ("GET", "/v1/videos/video_0/events"),
    ("POST", "/v1/videos/video_0/cancel"),
    ("POST", "/v1/videos/video_0/remix"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/mini"),
    ("GET", "/metrics"),
]


def test_the_file_holds_hashes_alone_and_is_its_owners(tmp_path: Path) -> None:
    path = tmp_path / "keys.txt"
    keys = [add_key(path, name) for name in ("alice", "bob")]
    assert not any(key in path.read_text() for key in keys)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    ring = KeyRing(path)
    assert [ring.owner_of(key) for key in (*keys, "cvx-other", "")] == ["alice", "bob", None, None]


def test_a_key_that_is_taken_out_of_the_file_is_out_at_once(tmp_path: Path) -> None:
    path = tmp_path / "keys.txt"
    alice, bob = add_key(path, "alice"), add_key(path, "bob")
    ring = KeyRing(path)
    path.write_text(path.read_text().splitlines()[1] + "\n")
    assert [ring.owner_of(key) for key in (alice, bob)] == [None, "bob"]
    path.write_text("spoilt")
    assert ring.owner_of(bob) == "bob", "a file that is being written locks nobody out"


@pytest.mark.parametrize("content", ["", "# none\n", "alice\n", "alice sha256:12\n", "a b sha256:" + "0" * 64])
def test_a_file_without_a_good_key_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "keys.txt"
    path.write_text(content)
    with pytest.raises(CvxError, match="--new-key"):
        KeyRing(path)


@pytest.mark.parametrize("name", ["", "a b", "a\nb", "-x", "ä"])
def test_a_name_that_would_not_be_read_back_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(CvxError, match="no name"):
        add_key(tmp_path / "keys.txt", name)


def test_no_route_is_open_without_a_key(tmp_path: Path) -> None:
    key = add_key(tmp_path / "keys.txt", "alice")
    still = Still(tmp_path / "data", tmp_path / "keys.txt")
    known = {route.path for route in still.client.app._app.routes if hasattr(route, "methods")}  # type: ignore[attr-defined]
    shown = {path.replace("video_0", "{identifier}").replace("/mini", "/{name}") for _, path in ROUTES}
    assert known - shown == {"/healthz", "/readyz"}, "a new route belongs into this test"
    for method, path in ROUTES:
        for headers in ({}, {"Authorization": "Bearer cvx-other"}, {"Authorization": f"Basic {key}"}):
            answer = still.client.request(method, path, headers=headers)
            assert answer.status_code == 401, path
            assert answer.json()["error"]["code"] == "invalid_api_key"
    assert still.client.get("/healthz").status_code == 200
    allowed = still.client.get("/v1/videos", headers={"Authorization": f"Bearer {key}"})
    assert allowed.status_code == 200, "the twin: with the key it opens"


def test_each_key_sees_its_own_videos_only(tmp_path: Path) -> None:
    path = tmp_path / "keys.txt"
    alice, bob = ({"Authorization": f"Bearer {add_key(path, name)}"} for name in ("alice", "bob"))
    still = Still(tmp_path / "data", path)
    made = still.client.post("/v1/videos", json={"prompt": PROMPT}, headers=alice).json()["id"]
    assert still.client.get(f"/v1/videos/{made}", headers=alice).status_code == 200
    assert still.client.get("/v1/videos", headers=bob).json()["data"] == []
    for method, end in (("GET", ""), ("DELETE", ""), ("GET", "/content"), ("POST", "/cancel"), ("GET", "/events")):
        assert still.client.request(method, f"/v1/videos/{made}{end}", headers=bob).status_code == 404


def test_the_command_line_makes_a_key_and_refuses_an_open_host(tmp_path: Path) -> None:
    path = tmp_path / "keys.txt"
    made = cvx("serve", "--api-keys", path, "--new-key", "alice")
    assert made.code == 0
    assert list(read_keys(path)) == ["alice"]
    assert KeyRing(path).owner_of(made.out.strip()) == "alice"
    assert "has a key of alice" in cvx("serve", "--api-keys", path, "--new-key", "alice").failure()
    assert "--no-auth" in cvx("serve", "--host", "0.0.0.0", "--data", tmp_path / "data").failure()
    assert "holds no key" not in made.err
    assert not (tmp_path / "data").exists()
