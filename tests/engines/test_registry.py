"""Engines by their names: what is opened, what their options reach, and the one line that says why one cannot run."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cvx_deploy.bundle.opened import Bundle
from cvx_deploy.engines import cuda
from cvx_deploy.engines.observe import ObservedBackend
from cvx_deploy.engines.onnxruntime.backend import OrtBackend, OrtSession
from cvx_deploy.engines.registry import ENGINES, engine_spec, open_backend
from cvx_deploy.engines.spec import EngineName, EngineOptions
from cvx_deploy.engines.tensorrt import backend as trt
from cvx_deploy.engines.tensorrt import libraries
from cvx_deploy.errors import EngineError
from cvx_deploy.miniatures import miniature
from cvx_deploy.pipeline.request import RunRequest, networks_needed
from cvx_deploy.pipeline.run import run
from cvx_deploy.progress import SilentProgress
from tests.command import cvx
from tests.engines.fake_cuda import FakeCuda
from tests.engines.onnxruntime.fake_onnxruntime import FakeOnnxRuntime

GPU_ENGINES = [engine for engine in ENGINES if engine_spec(engine).on_gpu]
PROMPT = ("--prompt", "a red circle moves to the right", "--steps", "2")


@pytest.fixture
def mini() -> Bundle:
    return Bundle.open(miniature("mini"))


def test_onnxruntime_is_opened_on_the_cpu(mini: Bundle) -> None:
    with open_backend("onnxruntime", mini) as backend:
        assert isinstance(backend, OrtBackend)
        assert isinstance(backend.to_device(np.zeros(3)).numpy(), np.ndarray)


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_the_version_of_an_engine_is_its_own(engine: EngineName) -> None:
    assert engine_spec(engine).version() == version(engine)


def test_onnxruntime_cuda_is_opened_on_the_device_that_is_named(mini: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeOnnxRuntime(monkeypatch, device=1)
    monkeypatch.setattr(cuda, "CudaPython", lambda: FakeCuda(count=2))
    with open_backend("onnxruntime-cuda", mini, EngineOptions(device=1)):
        assert fake.words() == ["upload", "load", "run"], "a copy, and a convolution"


@pytest.mark.parametrize("engine", ["tensorrt", "tensorrt-rtx"])
def test_options_reach_the_tensorrt_backend(engine: EngineName, mini: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []

    class Opened:
        def __init__(self, bundle: Bundle, library: Any, driver: Any, store: Any, **options: Any) -> None:
            self.bundle = bundle
            made.append((library, options))

        def __enter__(self) -> "Opened":
            return self

        def __exit__(self, *error: object) -> None:
            made.append("closed")

        def require(self, needed: Any) -> None:
            made.append(needed)

    needed, progress = [("text_encoder", {"batch": 1})], SilentProgress()
    monkeypatch.setattr(libraries, "load_library", lambda kind: kind)
    monkeypatch.setattr(cuda, "CudaPython", FakeCuda)
    monkeypatch.setattr(trt, "TensorRtBackend", Opened)
    how = EngineOptions(device=2, vram=10**9, cuda_graphs=False)
    with open_backend(engine, mini, how, needed=needed, progress=progress) as backend:
        assert isinstance(backend, Opened)
    options = {"device": 2, "vram": 10**9, "cuda_graphs": False, "residency": "resident", "progress": progress}
    assert made == [(engine, options), needed, "closed"]


@pytest.mark.parametrize("changes", [{}, {"guidance_scale": 1.0}, {"vae_tiling": True}])
def test_a_run_loads_exactly_the_networks_it_says_it_needs(mini: Bundle, tmp_path: Path, changes: Any) -> None:
    facts = replace(mini.manifest.vae, tile_height=48, tile_width=40)
    bundle = replace(mini, manifest=replace(mini.manifest, vae=facts))
    loaded: list[tuple[str, dict[str, int]]] = []

    class Recording(OrtBackend):
        @contextmanager
        def load(self, role: str, sizes: Mapping[str, int]) -> Iterator[OrtSession]:
            loaded.append((role, dict(sizes)))
            with super().load(role, sizes) as session:
                yield session

    request = RunRequest(("a red circle",), tmp_path / "video.npy", steps=2, **changes)
    run(Recording(bundle, threads=1), request)
    needed = networks_needed(bundle, request)
    assert all(need in loaded for need in needed)
    assert all(load in needed for load in loaded)
    assert len(needed) == (7 if changes.get("vae_tiling") else 4)


def test_the_check_for_finite_numbers_is_put_around_any_engine(mini: Bundle) -> None:
    with open_backend("onnxruntime", mini, check_finite=True) as backend:
        assert isinstance(backend, ObservedBackend)


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no driver be found, as on a machine without a GPU, and no weights be read."""

    def missing() -> None:
        raise EngineError("this machine has no NVIDIA driver", fix="install one")

    monkeypatch.setattr(cuda, "CudaPython", missing)
    monkeypatch.setattr(Bundle, "weight_path", lambda *_: pytest.fail("weights were read"))


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize("engine", GPU_ENGINES)
def test_without_a_gpu_every_engine_for_one_fails_in_one_line(engine: str, tmp_path: Path) -> None:
    outcome = cvx("run", *PROMPT, "--engine", engine, "--output", tmp_path / "out.npy")
    line = outcome.failure()
    assert outcome.err.strip() == line
    assert any(reason in line for reason in ("no NVIDIA driver", "not installed", "has no CUDA"))
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("no_gpu")
def test_without_a_driver_onnxruntime_cuda_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    FakeOnnxRuntime(monkeypatch)
    line = cvx("run", *PROMPT, "--engine", "onnxruntime-cuda", "--output", tmp_path / "out.npy").failure()
    assert line == "error: this machine has no NVIDIA driver. fix: install one."


def test_run_shares_its_videos_out_among_the_devices(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    opened: list[tuple[Any, EngineOptions, Any]] = []

    def on_the_cpu(engine: EngineName, bundle: Bundle, how: EngineOptions, **options: Any) -> Any:
        opened.append((engine, how, options))
        return open_backend("onnxruntime", bundle, EngineOptions(threads=1))

    common = ("run", *PROMPT, "--num-videos", "3")
    assert cvx(*common, "--threads", 1, "--output", tmp_path / "one.npy").code == 0
    monkeypatch.setattr("cvx_deploy.pipeline.pipeline.open_backend", on_the_cpu)
    several = ("--engine", "tensorrt", "--devices", "1,3", "--vram", "1.5GB", "--no-cuda-graphs", "--check-finite")
    assert cvx(*common, *several, "--output", tmp_path / "two.npy").code == 0
    needed = [
        ("text_encoder", {"batch": 1}),
        ("modulation", {}),
        ("transformer", {"batch": 2}),
        ("vae_decoder_first", {"latent_height": 6, "latent_width": 6}),
    ]
    options = {"needed": needed, "check_finite": True}
    for (engine, how, given), device in zip(opened, (1, 3), strict=True):
        assert engine == "tensorrt"
        assert how == EngineOptions(device=device, vram=1_500_000_000, cuda_graphs=False, residency="phase")
        assert {key: value for key, value in given.items() if key != "progress"} == options
    assert np.array_equal(np.load(tmp_path / "one.npy"), np.load(tmp_path / "two.npy"))


@pytest.mark.parametrize(
    "words",
    [
        ["--engine", "onnxruntime", "--vram", "12GB"],
        ["--engine", "onnxruntime", "--devices", "0"],
        ["--engine", "onnxruntime", "--no-cuda-graphs"],
        ["--engine", "onnxruntime-cuda", "--vram", "12GB"],
        ["--engine", "onnxruntime-cuda", "--no-cuda-graphs"],
        ["--engine", "tensorrt", "--threads", "2"],
        ["--engine", "tensorrt", "--vram", "much"],
        ["--engine", "tensorrt", "--devices", "0,0"],
        ["--engine", "tensorrt", "--devices", "first"],
        ["--engine", "tensorrt", "--devices", "-1"],
    ],
    ids=" ".join,
)
def test_options_that_mean_nothing_to_an_engine_are_wrong_usage(words: list[str]) -> None:
    outcome = cvx("run", *PROMPT, *words)
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.splitlines()[-1].startswith("Error: ")
