"""A worker in this process: what it saves, and how soon it lets go of a job that is cancelled."""

import io
import json
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

from cvx_deploy.engines.endable import endable
from cvx_deploy.errors import OutputError
from cvx_deploy.media.encoders import VideoFormat
from cvx_deploy.media.interpolation import Rate
from cvx_deploy.miniatures import miniature
from cvx_deploy.serve import worker
from cvx_deploy.serve.files import Output
from cvx_deploy.serve.jobs import Spec
from cvx_deploy.serve.worker import Worker
from tests.serve.conftest import PROMPT

SPEC = Spec("mini", PROMPT, "", 9, 48, 48, 8, 5, 2.0, 7)
LONG_CALL = 4.0  # seconds of an engine's call


@pytest.fixture
def running() -> Iterator[Worker]:
    settings = {"models": {"mini": str(miniature("mini"))}, "engine": "onnxruntime", "threads": 1, "device": None}
    made = Worker({**settings, "vram": None, "cuda_graphs": True, "point_seconds": 3600.0}, io.StringIO())
    earlier = signal.signal(signal.SIGUSR1, made._raise)
    yield made
    made._close(None)
    signal.signal(signal.SIGUSR1, earlier)


def told(made: Worker, folder: Path) -> list[str]:
    """Let a worker make the job, and return the events that it tells of."""
    made._do({"job": "one", "spec": msgspec.to_builtins(SPEC), "folder": str(folder)})
    assert isinstance(made._out, io.StringIO)
    return [json.loads(line)["event"] for line in made._out.getvalue().splitlines()]


@pytest.mark.parametrize(("seconds", "saved"), [(3600.0, 0), (0.0, 1)])
def test_a_job_that_is_shorter_than_the_time_between_two_points_saves_none(
    running: Worker, tmp_path: Path, seconds: float, saved: int
) -> None:
    running._settings["point_seconds"] = seconds
    events = told(running, tmp_path)
    assert events.count("saved") == saved
    assert events[-1] == "done"
    assert {path.name for path in tmp_path.iterdir()} == {"video.mp4", "thumbnail.jpg", "spritesheet.png"}


class Gate:
    """A writer that takes frames once it is let, and the second time cannot."""

    def __init__(self) -> None:
        self.open, self.taken = threading.Event(), 0

    def write(self, frames: NDArray[np.float32]) -> None:
        assert self.open.wait(30)
        self.taken += 1
        if self.taken > 1:
            raise OutputError("the place is full", fix="make room")


def test_frames_are_encoded_while_the_next_ones_are_decoded_and_what_goes_wrong_is_told() -> None:
    gate, frames = Gate(), np.zeros((1, 48, 48, 3), np.float32)
    with ThreadPoolExecutor(1) as beside:
        output = Output(gate, VideoFormat(9, 48, 48, 8), Rate(8, 8), beside)  # type: ignore[arg-type]
        output.add(frames)
        assert gate.taken == 0, "the caller goes on before they are taken"
        gate.open.set()
        output.wait()
        assert gate.taken == 1
        output.add(frames)
        with pytest.raises(OutputError, match="full"):
            output.wait()


class Slow:
    """A pipeline whose engine is in one call for long, and can be ended there, as ONNX Runtime on a CPU can."""

    def __init__(self, pipeline: Any) -> None:
        self.identity = "slow"
        self.bundle, self.engine, self.ended = pipeline.bundle, pipeline.engine, threading.Event()
        pipeline.close()

    def stream(self, **_: Any) -> Iterator[object]:
        endable(lambda: self.ended.wait(LONG_CALL), self.ended.set)
        yield object()

    def close(self) -> None:
        """As a pipeline's."""


@pytest.mark.parametrize(("patience", "soon"), [(worker._PATIENCE, True), (60.0, False)])
def test_a_cancelled_job_ends_within_a_second_in_the_middle_of_a_long_call(
    running: Worker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, patience: float, soon: bool
) -> None:
    monkeypatch.setattr(worker, "_PATIENCE", patience)
    running._pipelines["mini"] = slow = Slow(running._pipeline("mini"))  # type: ignore[assignment]
    times: list[float] = []

    def cancel() -> None:
        times.append(time.monotonic())
        running._end("cancelled", "one")

    timer = threading.Timer(0.2, cancel)
    timer.start()
    events = told(running, tmp_path)
    took = time.monotonic() - times[0]
    timer.join()
    if soon:
        assert events == ["cancelled"]
        assert took < LONG_CALL / 2
        assert slow.ended.is_set()
        assert running._pipelines == {}, "what was broken off is not used again"
    else:
        assert took > LONG_CALL / 2, "the twin: without the signal it lasts as long as the call"
    assert list(tmp_path.iterdir()) == [] or not soon
