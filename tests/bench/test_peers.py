"""Peers in processes of their own: what they say arrives, and one that dies says so."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from cvx_deploy.bench.peers import PeerProcess, Runner, Work
from cvx_deploy.errors import CvxError
from cvx_deploy.pipeline.report import Span
from cvx_deploy.pipeline.request import RunRequest
from cvx_deploy.pipeline.timing import Trace
from cvx_deploy.shape import Shape

WORK = Work(Path("nowhere"), Shape(9, 48, 48), None, RunRequest(("a circle",), "video.mp4"))


@dataclass(frozen=True)
class Pretender:
    """A peer that does nothing, says that it cannot, or dies."""

    does: Literal["nothing", "refuses", "dies"]
    name: str = "pretender"

    @contextmanager
    def open(self, work: Work) -> Iterator[Runner]:
        print("a word on stdout, which is for results alone")
        if self.does == "refuses":
            raise CvxError("it will not", fix="ask another")

        def make(output: Path) -> Trace:
            if self.does == "dies":
                os._exit(9)
            return Trace(0.0, 2.0, (Span("vae decode", 0.0, 1.0),), ())

        yield make


def test_traces_come_back_and_the_process_ends(capfd: pytest.CaptureFixture[str]) -> None:
    with PeerProcess(Pretender("nothing"), WORK) as peer:
        assert peer.opened() >= 0
        assert peer.make(Path("video.mp4")).first_frame == 1.0
        pid = peer.pid
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert capfd.readouterr().out == ""


def test_a_stated_failure_keeps_its_fix() -> None:
    with (
        PeerProcess(Pretender("refuses"), WORK) as peer,
        pytest.raises(CvxError, match="pretender: it will not") as told,
    ):
        peer.opened()
    assert told.value.fix == "ask another"


def test_a_process_that_dies_is_a_stated_failure() -> None:
    with PeerProcess(Pretender("dies"), WORK) as peer:
        peer.opened()
        with pytest.raises(CvxError, match="ended with 9"):
            peer.make(Path("video.mp4"))
