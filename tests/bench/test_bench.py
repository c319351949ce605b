"""The benchmark, on the miniature: peers make the same video, and what it took is written in three forms."""

import json
import os
import time
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from cvx_deploy.bench import bench
from cvx_deploy.bench.markdown import tables
from cvx_deploy.bench.peers import PeerKind
from cvx_deploy.bench.results import BenchResults, read_results
from cvx_deploy.bundle.opened import Bundle
from cvx_deploy.engines.spec import EngineName
from cvx_deploy.exporters.reference.checkpoint import Reference
from cvx_deploy.measure.memory import GpuMeter
from cvx_deploy.miniatures import miniature
from cvx_deploy.pipeline.report import Span
from cvx_deploy.pipeline.request import RunRequest
from cvx_deploy.pipeline.timing import Trace
from cvx_deploy.progress import SilentProgress
from tests.command import Outcome, cvx
from tests.tolerances import PIXELS_PSNR

WORDS = ("bench", "--model", "mini", "--steps", 5, "--runs", 2, "--quiet")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bench")


@pytest.fixture(scope="module")
def outcome(folder: Path) -> Outcome:
    return cvx(*WORDS, "--engine", "onnxruntime", "--fast", "--output", folder, "--json")


@pytest.fixture(scope="module")
def found(folder: Path, outcome: Outcome) -> BenchResults:
    assert outcome.code == 0, outcome
    return read_results(folder / "bench.json")


def test_results_are_on_stdout_and_in_three_files(folder: Path, found: BenchResults, outcome: Outcome) -> None:
    told = json.loads(outcome.out)
    assert told["files"] == [str(folder / name) for name in ("bench.json", "bench.md", "bench.html")]
    assert all(Path(name).stat().st_size for name in told["files"])
    assert (
        [peer["name"] for peer in told["peers"]]
        == [peer.name for peer in found.peers]
        == [
            "eager",
            "onnxruntime",
            "onnxruntime --fast",
        ]
    )


def test_engine_makes_the_video_that_eager_makes(found: BenchResults) -> None:
    assert found.peers[0].psnr is None
    assert found.peers[1].psnr is not None
    assert found.peers[1].psnr > PIXELS_PSNR


def test_stages_add_up_to_the_whole(found: BenchResults) -> None:
    for peer in found.peers:
        assert len(peer.runs) == 2
        for run in peer.runs:
            assert 0.8 * run.seconds < sum(run.stages.values()) <= run.seconds
            assert len(run.steps) == 4
            assert 0 < run.first_frame < run.seconds
            assert {"text encoder", "transformer", "vae decode", "write video"} <= run.stages.keys()


def test_only_the_engine_loads_within_a_run(found: BenchResults) -> None:
    eager, engine, _ = found.peers
    assert "load" not in eager.runs[0].stages
    assert engine.runs[0].stages["load"] > 0


def test_memory_is_that_of_the_peers_own_process(found: BenchResults) -> None:
    eager, engine, _ = found.peers
    assert max(engine.runs[0].resident.values()) < max(eager.runs[0].resident.values())
    assert all(sample[1] >= sample[2] > 0 for sample in engine.memory)


def test_what_cannot_be_measured_without_a_gpu_is_named(found: BenchResults) -> None:
    assert set(found.not_measured) == {"compile", "int8", "fp8"}


def test_steps_forecast_are_held_against_the_engines_own_full_run(folder: Path, found: BenchResults) -> None:
    *others, fast = found.peers
    assert [peer.forecast for peer in others] == [None, None]
    assert fast.forecast is not None
    assert fast.forecast.against == "onnxruntime"
    assert fast.forecast.psnr < PIXELS_PSNR
    assert fast.forecast.broken, "five steps are too few for it: a twin of those that are enough"
    text = (folder / "bench.md").read_text()
    assert "no parity with the reference" in text
    assert "no parity with the reference" in (folder / "bench.html").read_text()


def test_conditions_are_complete(found: BenchResults) -> None:
    told = found.conditions
    assert {"cpu", "cores", "memory_bytes", "python", "versions", "video", "runs", "warm_up_runs"} <= told.keys()
    assert told["video"]["seed"] == 0


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    assert "model_index.json" in cvx(*WORDS, "--checkpoint", tmp_path, "--output", tmp_path).failure()


def test_an_engine_that_cannot_run_the_bundle_ends_the_benchmark(tmp_path: Path) -> None:
    failed = cvx(*WORDS, "--engine", "tensorrt-rtx", "--output", tmp_path)
    assert "tensorrt-rtx: " in failed.failure()
    assert not list(tmp_path.iterdir())


class FakeProcess:
    """A peer's process that only counts how many there are."""

    running: ClassVar[list[str]] = []
    most: ClassVar[int] = 0
    order: ClassVar[list[str]] = []
    pid = os.getpid()

    def __init__(self, kind: PeerKind, _: object) -> None:
        self.kind = kind

    def __enter__(self) -> "FakeProcess":
        self.running.append(self.kind.name)
        FakeProcess.most = max(FakeProcess.most, len(self.running))
        return self

    def __exit__(self, *_: object) -> None:
        self.running.remove(self.kind.name)

    def opened(self) -> float:
        return 0.5

    def make(self, output: Path) -> Trace:
        self.order.append(self.kind.name)
        if output.suffix == ".npy":
            np.save(output, np.zeros(3))
        start = time.monotonic()
        return Trace(start, start + 1, (Span("vae decode", start, start + 1),), (start, start + 1))


@pytest.mark.parametrize(("engines", "most"), [(("onnxruntime", "openvino"), 2), (("onnxruntime-cuda", "tensorrt"), 1)])
def test_a_gpu_is_one_peers_at_a_time(
    engines: tuple[EngineName, ...], most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "PeerProcess", FakeProcess)
    monkeypatch.setattr(GpuMeter, "open", lambda: None)
    FakeProcess.most, FakeProcess.order = 0, []
    video = RunRequest(("a circle",), "video.mp4", steps=2)
    request = bench.BenchRequest(Bundle.open(miniature("mini")), engines, (), Reference(), video, 2, "")
    found = bench.bench(request, SilentProgress())
    assert FakeProcess.most == most
    assert [peer.psnr for peer in found.peers] == [None, 150.0]
    assert found.conditions["interleaved"] is (most > 1)
    assert FakeProcess.order == ([*engines] * 3 if most > 1 else [engine for engine in engines for _ in range(3)])
    assert ("one peer after another" in "".join(str(table) for table in tables(found))) is (most == 1)
