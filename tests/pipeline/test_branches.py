"""Guidance over two devices: the video of one, each branch where it belongs, and both ended when one is."""

import json
import threading
from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from cvx_deploy import Pipeline
from cvx_deploy.bundle.opened import Bundle
from cvx_deploy.engines.backend import Backend
from cvx_deploy.engines.onnxruntime.backend import OrtBackend
from cvx_deploy.engines.registry import open_backend
from cvx_deploy.engines.spec import EngineOptions
from cvx_deploy.engines.tensorrt.backend import TensorRtBackend
from cvx_deploy.engines.tensorrt.store import EngineKey, EngineNeed
from cvx_deploy.errors import EngineError
from cvx_deploy.miniatures import miniature
from cvx_deploy.pipeline import branches
from cvx_deploy.pipeline.events import Step
from cvx_deploy.pipeline.report import RunReport
from cvx_deploy.pipeline.request import RunRequest, networks_needed
from cvx_deploy.pipeline.run import events, make_latents
from cvx_deploy.progress import SilentProgress
from tests.command import cvx
from tests.engines.fake_cuda import FakeCuda
from tests.engines.tensorrt.fake_tensorrt import FakeStore, Networks, fake_library
from tests.tolerances import NETWORK_RELATIVE

PROMPT = "a red circle moves to the right"
REQUEST = RunRequest((PROMPT,), None, negative_prompt="a dark background", steps=3, seed=5)


class Watched(OrtBackend):
    """Keeps the batch and the embeddings of every run of the transformer; may meet others there, or fail."""

    def __init__(self, bundle: Bundle, meeting: threading.Barrier | None = None, fails_at: int | None = None) -> None:
        super().__init__(bundle, threads=1)
        self.meeting, self.fails_at = meeting, fails_at
        self.seen: list[NDArray[Any]] = []

    def load(self, role: str, sizes: Mapping[str, int]) -> Any:
        loaded = super().load(role, sizes)
        return loaded if role != "transformer" else _Loaded(loaded, self)


class _Loaded:
    def __init__(self, loaded: Any, backend: Watched) -> None:
        self._loaded, self._backend = loaded, backend

    def __enter__(self) -> "_Loaded":
        self._session = self._loaded.__enter__()
        return self

    def __exit__(self, *error: Any) -> Any:
        return self._loaded.__exit__(*error)

    def run(self, inputs: Mapping[str, Any]) -> Any:
        backend = self._backend
        backend.seen.append(backend.to_host(inputs["encoder_hidden_states"]))
        if backend.meeting is not None:
            backend.meeting.wait()
        if len(backend.seen) == backend.fails_at:
            raise EngineError("a device is lost", fix="mend it")
        return self._session.run(inputs)


def latents(request: RunRequest, *backends: Backend, report: RunReport | None = None) -> NDArray[np.float32]:
    return make_latents(backends[0], request, SilentProgress(), report or RunReport(), backends[1:])


def relative(found: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.fixture(scope="module")
def mini() -> Bundle:
    return Bundle.open(miniature("mini"))


@pytest.mark.parametrize("scheduler", ["ddim", "dpm"])
def test_two_devices_make_the_video_of_one(mini: Bundle, scheduler: Any) -> None:
    request, report = replace(REQUEST, scheduler=scheduler, dynamic_cfg=True), RunReport()
    expected = latents(request, OrtBackend(mini, threads=1))
    first, second = Watched(mini), Watched(mini)
    found = latents(request, first, second, report=report)
    assert relative(found, expected) < NETWORK_RELATIVE
    assert report.branches_apart
    assert {len(embeds) for embeds in (*first.seen, *second.seen)} == {1}
    assert len(first.seen) == len(second.seen) == request.steps
    assert not np.array_equal(first.seen[0], second.seen[0])


def test_twin_branches_that_are_swapped_make_another_video(mini: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, run = latents(REQUEST, OrtBackend(mini, threads=1)), branches._Joined._run
    monkeypatch.setattr(branches._Joined, "_run", lambda joined, branch, inputs: run(joined, 1 - branch, inputs))
    assert relative(latents(REQUEST, OrtBackend(mini), OrtBackend(mini)), expected) > 100 * NETWORK_RELATIVE


def test_image_to_video_runs_apart_too() -> None:
    bundle = Bundle.open(miniature("mini-i2v"))
    image = np.random.default_rng(0).uniform(-1, 1, (1, 3, 1, 48, 48)).astype(np.float32)
    request = replace(REQUEST, image=image)
    assert relative(latents(request, Watched(bundle), Watched(bundle)), latents(request, Watched(bundle))) < (
        NETWORK_RELATIVE
    )


def test_both_branches_run_at_the_same_time(mini: Bundle) -> None:
    meeting = threading.Barrier(2, timeout=30)
    latents(REQUEST, Watched(mini, meeting), Watched(mini, meeting))


def test_two_gpus_compute_what_two_cpus_do_to_the_bit(mini: Bundle, tmp_path: Path) -> None:
    networks = Networks(mini)
    store: Any = FakeStore(tmp_path)
    made: Any = [
        (gpu, TensorRtBackend(mini, fake_library(gpu, networks), gpu, store)) for gpu in (FakeCuda(), FakeCuda())
    ]
    found = latents(REQUEST, *(backend for _, backend in made))
    for gpu, backend in made:
        backend.close()
        assert gpu.log.count(("run", "transformer")) == REQUEST.steps
        gpu.assert_clean()
    assert np.array_equal(found, latents(REQUEST, OrtBackend(mini), OrtBackend(mini)))


@pytest.mark.parametrize("broken", [0, 1])
def test_a_branch_that_fails_ends_the_other(mini: Bundle, broken: int) -> None:
    backends = [Watched(mini), Watched(mini)]
    backends[broken].fails_at = 2
    with pytest.raises(EngineError, match="a device is lost"):
        latents(REQUEST, *backends)
    assert [len(backend.seen) for backend in backends] == [2, 2]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("branch")]
    backends[broken].fails_at = None
    assert np.array_equal(latents(REQUEST, *backends), latents(REQUEST, OrtBackend(mini), OrtBackend(mini)))


def test_a_device_that_cannot_load_ends_the_run(mini: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    backends = Watched(mini), Watched(mini)

    def refuses(*_: Any) -> Any:
        raise EngineError("no room", fix="make some")

    monkeypatch.setattr(backends[1], "load", refuses)
    with pytest.raises(EngineError, match="no room"):
        latents(REQUEST, *backends)
    assert backends[0].seen == []


def test_a_run_that_is_closed_ends_both(mini: Bundle) -> None:
    backends = Watched(mini), Watched(mini)
    with closing(events(backends[0], REQUEST, SilentProgress(), RunReport(), backends[1:])) as happening:
        assert isinstance(next(happening), Step)
    assert [len(backend.seen) for backend in backends] == [1, 1]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("branch")]


@pytest.mark.parametrize("change", [{"num_videos": 2}, {"guidance_scale": 1.0}], ids=["two videos", "no guidance"])
def test_several_videos_are_shared_out_and_one_branch_needs_one_device(mini: Bundle, change: dict[str, Any]) -> None:
    request, report = replace(REQUEST, **change), RunReport()
    backends = Watched(mini), Watched(mini)
    found = latents(request, *backends, report=report)
    assert not report.branches_apart
    assert np.array_equal(found, latents(request, OrtBackend(mini, threads=1)))
    assert [len(backend.seen) for backend in backends] == ([3, 3] if "num_videos" in change else [3, 0])


def test_forecast_steps_run_the_same_calls_apart(mini: Bundle) -> None:
    request = replace(REQUEST, steps=8, fast=True)
    reports = RunReport(), RunReport()
    expected = latents(request, OrtBackend(mini, threads=1), report=reports[0])
    backends = Watched(mini), Watched(mini)
    found = latents(request, *backends, report=reports[1])
    assert relative(found, expected) < NETWORK_RELATIVE
    assert (reports[0].steps[0].run, reports[0].steps[0].forecast) == (
        reports[1].steps[0].run,
        reports[1].steps[0].forecast,
    )
    assert [len(backend.seen) for backend in backends] == [len(reports[0].steps[0].run)] * 2


def test_an_engine_of_both_branches_is_refused_with_what_to_build() -> None:
    key = EngineKey("tensorrt", "g", {}, {"batch": (2, 2, 2)}, {}, "1", ("sm90",))
    (said,) = key.misfits(EngineNeed("g", {}, "1", {"batch": 1}, None))
    assert said.startswith("it takes batch 2 to 2, not 1, which")
    assert "two branches run on two GPUs" in said
    assert not replace(key, profile={"batch": (1, 2, 2)}).misfits(EngineNeed("g", {}, "1", {"batch": 1}, None))


def test_the_networks_that_are_needed_are_those_of_one_branch(mini: Bundle) -> None:
    batches = {
        (devices, videos): dict(networks_needed(mini, replace(REQUEST, num_videos=videos), devices=devices))[
            "transformer"
        ]
        for devices in (1, 2)
        for videos in (1, 2)
    }
    assert [key for key, sizes in batches.items() if sizes == {"batch": 1}] == [(2, 1)]


@pytest.fixture
def on_two_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every engine be ONNX Runtime on the CPU."""
    monkeypatch.setattr(
        "cvx_deploy.pipeline.pipeline.open_backend",
        lambda engine, bundle, *_, **__: open_backend("onnxruntime", bundle, EngineOptions(threads=1)),
    )


@pytest.mark.usefixtures("on_two_cpus")
def test_python_and_the_command_line_run_branches_apart_and_say_so(tmp_path: Path) -> None:
    with Pipeline.from_pretrained("mini", engine="tensorrt", devices=(0, 1)) as pipeline:
        video = pipeline(PROMPT, num_inference_steps=2)
    assert video.report.branches_apart
    words = ["run", "--prompt", PROMPT, "--steps", 2, "--engine", "tensorrt", "--devices", "0,1"]
    outcome = cvx(*words, "--output", tmp_path / "out.npy", "--json")
    assert json.loads(outcome.out)["branches_apart"] is True
    assert "both branches of guidance ran at once" in outcome.err
    assert np.array_equal(np.load(tmp_path / "out.npy").reshape(video.frames.shape), video.frames)
