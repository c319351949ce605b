"""A worker on a node, whose process is a list of words: which files go back to the server, and when."""

import os
from pathlib import Path
from typing import Any

import pytest

from cvx_deploy import __version__
from cvx_deploy.serve.files import JobFiles
from cvx_deploy.serve.node import NodeWorker
from cvx_deploy.serve.process import GoneError, Word

RESULTS = ("video.mp4", "thumbnail.jpg", "spritesheet.png")


class Told:
    """Says what it is given, and then that it has gone."""

    def __init__(self) -> None:
        self.words: list[Word] = []
        self.heard_of: list[Word] = []

    def say(self, words: Word) -> None:
        self.heard_of.append(words)

    def heard(self, seconds: float) -> Word | None:
        if not self.words:
            raise GoneError("was killed by signal 9")
        return self.words.pop(0)


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> NodeWorker:
    monkeypatch.setenv("CVX_CACHE_DIR", str(tmp_path))
    return NodeWorker({}, {}, None, __version__)


def test_points_and_clips_go_back_once_and_the_video_when_it_is_done(node: NodeWorker) -> None:
    told: Any = Told()
    node._process = told
    node.say({"job": "video_1"}, {"source.npy": b"picture", "video.mp4.clips/0.npy": b"clip"})
    folder = Path(told.heard_of[0]["folder"])
    assert (folder / "source.npy").read_bytes() == b"picture"
    assert (folder / "video.mp4.clips" / "0.npy").read_bytes() == b"clip"
    saved = {"event": "saved", "job": "video_1"}
    (folder / "point-1.npz").write_bytes(b"first")
    told.words = [saved, {"event": "step", "job": "video_1"}, saved]
    assert node.hear() == (saved, {"point-1.npz": b"first", "video.mp4.clips/0.npy": b"clip"})
    assert node.hear() == ({"event": "step", "job": "video_1"}, {})
    (folder / "point-1.npz").write_bytes(b"second")
    os.utime(folder / "point-1.npz", ns=(1, 1))
    assert node.hear() == (saved, {"point-1.npz": b"second"}), "what the server has is not sent again"
    for name in RESULTS:
        (folder / name).write_bytes(name.encode())
    told.words = [{"event": "done", "job": "video_1", "size": 3}]
    word, files = node.hear() or ({}, {})
    assert (word["event"], files) == ("done", {name: name.encode() for name in RESULTS})
    assert not folder.exists()
    assert node.hear() == ({"event": "gone", "why": "was killed by signal 9"}, {})


def test_a_node_of_another_version_is_told_of() -> None:
    word = NodeWorker({}, {}, None, "0.0.0").start()
    assert word is not None
    assert (word["event"], word["fix"]) == ("broken", "install the same version on all nodes")


def test_what_a_video_goes_on_from_is_neither_its_source_nor_half_a_file(tmp_path: Path) -> None:
    (tmp_path / "video.mp4.clips").mkdir()
    for name in ("point-1.npz", ".point-1.npz.x", "source.npy", "video.mp4", "video.mp4.clips/.0.npy.x"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "video.mp4.clips" / "mark.json").write_bytes(b"")
    assert set(JobFiles(tmp_path).kept()) == {"point-1.npz", "video.mp4.clips/mark.json"}
    assert set(JobFiles(tmp_path).sources()) == {"source.npy"}
