"""Several devices: the videos of one, whichever device makes which."""

import threading
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cvx_deploy.bundle.opened import Bundle
from cvx_deploy.engines.onnxruntime.backend import OrtBackend
from cvx_deploy.engines.tensorrt.backend import TensorRtBackend
from cvx_deploy.errors import EngineError
from cvx_deploy.miniatures import miniature
from cvx_deploy.pipeline.devices import share_out
from cvx_deploy.pipeline.report import RunReport
from cvx_deploy.pipeline.request import RunRequest
from cvx_deploy.pipeline.run import make_latents
from cvx_deploy.progress import SilentProgress
from tests.engines.fake_cuda import FakeCuda
from tests.engines.tensorrt.fake_tensorrt import FakeStore, Networks, fake_library

REQUEST = RunRequest(("a red circle moves to the right", "a blue square"), "unused.npy", steps=2, num_videos=2, seed=5)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_every_piece_is_done_once_in_turn_by_every_device(count: int) -> None:
    done: list[tuple[str, int]] = []

    def work(device: str, pieces: Sequence[int]) -> Generator[None, None, None]:
        for piece in pieces:
            done.append((device, piece))
            yield

    list(share_out("abc", count, work))
    assert sorted(done, key=lambda each: each[1]) == [("abc"[piece % 3], piece) for piece in range(count)]


def test_devices_work_at_the_same_time() -> None:
    meeting = threading.Barrier(2, timeout=30)

    def work(_: str, __: Sequence[int]) -> Generator[None, None, None]:
        meeting.wait()
        yield

    list(share_out("ab", 2, work))


def test_one_device_that_fails_stops_the_others() -> None:
    closed: list[str] = []

    def work(device: str, _: Sequence[int]) -> Generator[None, None, None]:
        try:
            if device == "b":
                raise EngineError("b failed", fix="mend it")
            while True:
                yield
        finally:
            closed.append(device)

    with pytest.raises(EngineError, match="b failed"):
        list(share_out("ab", 2, work))
    assert sorted(closed) == ["a", "b"]


def test_several_devices_make_the_videos_of_one(tmp_path: Path) -> None:
    bundle = Bundle.open(miniature("mini"))
    report, networks = RunReport(), Networks(bundle)
    expected = make_latents(OrtBackend(bundle), REQUEST, SilentProgress(), report)
    store: Any = FakeStore(tmp_path)
    gpus = [FakeCuda(), FakeCuda()]
    backends = [TensorRtBackend(bundle, fake_library(gpu, networks), gpu, store) for gpu in gpus]
    found = make_latents(backends[0], REQUEST, SilentProgress(), RunReport(), backends[1:])
    for backend in backends:
        backend.close()
    assert report.seeds == [5, 6, 7, 8]
    assert np.array_equal(found, expected)
    assert len({latents.tobytes() for latents in found}) == 4
    for gpu in gpus:
        assert len([entry for entry in gpu.log if entry == ("run", "transformer")]) == 2 * REQUEST.steps
        gpu.assert_clean()
