"""The model for Triton: its config by Triton's schema, its code on a stand-in of the backend, and the real server."""

import importlib.util
import json
import os
import queue
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import numpy as np
import pytest

from cvx_deploy import Pipeline
from cvx_deploy.bundle.opened import Bundle
from cvx_deploy.engines.spec import EngineOptions
from cvx_deploy.miniatures import miniature
from cvx_deploy.serve.triton.config import INPUTS, config_text, write_model
from tests.command import cvx
from tests.conftest import ROOT
from tests.serve.conftest import PROMPT, until
from tests.serve.test_refusals import picture

ENVIRONMENT = os.environ.get("CVX_TRITON_ENV")  # a virtual environment with nvidia-pytriton: see CONTRIBUTING.md
FEW: dict[str, Any] = {"prompt": PROMPT, "num_inference_steps": 4, "seed": 7}
ONE_THREAD = EngineOptions(threads=1)


class Tensor:
    """As the backend's."""

    def __init__(self, name: str, values: np.ndarray[Any, Any]) -> None:
        self.name, self._values = name, values

    def as_numpy(self) -> np.ndarray[Any, Any]:
        return self._values


class TritonError:
    """As the backend's."""

    CANCELLED, INVALID_ARG, INTERNAL = "cancelled", "invalid", "internal"

    def __init__(self, message: str, code: str) -> None:
        self.message, self.code = message, code


class InferenceResponse:
    """As the backend's."""

    def __init__(self, output_tensors: list[Tensor] | None = None, error: TritonError | None = None) -> None:
        self.error = error
        self.values = {one.name: one.as_numpy().item() for one in output_tensors or ()}


class Request:
    """A request, and whoever answers it: cancelled after so many answers."""

    def __init__(self, cancelled_after: int = 1000, **values: Any) -> None:
        self._values, self._cancelled_after = values, cancelled_after
        self.answers: list[InferenceResponse] = []
        self.final: list[bool] = []

    def get_response_sender(self) -> "Request":
        return self

    def is_cancelled(self) -> bool:
        return len(self.answers) >= self._cancelled_after

    def send(self, answer: InferenceResponse, flags: int = 0) -> None:
        self.answers.append(answer)
        self.final.append(flags == 1)

    def tensor(self, name: str) -> Tensor | None:
        if name not in self._values:
            return None
        value = self._values[name]
        return Tensor(name, np.array([value.encode() if isinstance(value, str) else value], dtype=object))

    @property
    def error(self) -> TritonError:
        assert [answer.error for answer in self.answers[:-1]] == [None] * (len(self.answers) - 1)
        assert self.final == [False] * (len(self.answers) - 1) + [True], "one final answer, at the end"
        error = self.answers[-1].error
        assert error is not None
        return error


def backend() -> ModuleType:
    lent = ModuleType("triton_python_backend_utils")
    lent.get_input_tensor_by_name = lambda request, name: request.tensor(name)  # type: ignore[attr-defined]
    lent.TRITONSERVER_RESPONSE_COMPLETE_FINAL = 1  # type: ignore[attr-defined]
    lent.TritonModelException = type("TritonModelException", (Exception,), {})  # type: ignore[attr-defined]
    for kind in (Tensor, TritonError, InferenceResponse):
        setattr(lent, kind.__name__, kind)
    return lent


def arguments(config: dict[str, Any]) -> dict[str, str]:
    return {"model_config": json.dumps(config), "model_name": "mini", "model_instance_device_id": "0"}


def triton_schema() -> ModuleType:
    """Return the module of Triton's configs, by itself: the rest of its package wants an older protobuf."""
    package = importlib.util.find_spec("tritonclient")
    if package is None or package.submodule_search_locations is None:
        pytest.skip("tritonclient is not installed")
    file = Path(package.submodule_search_locations[0]) / "grpc" / "model_config_pb2.py"
    spec = importlib.util.spec_from_file_location("model_config_pb2", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def parsed(text: str) -> Any:
    """Return a config by Triton's own schema, which refuses what it does not know."""
    schema = triton_schema()
    from google.protobuf import text_format

    return text_format.Parse(text, schema.ModelConfig())


def plain(text: str) -> dict[str, Any]:
    """Return a config's parameters as Triton hands them to a model."""
    found = re.findall(r'parameters { key: "(.*)" value { string_value: "(.*)" } }', text)
    return {"parameters": {key: {"string_value": value} for key, value in found}}


@pytest.fixture(scope="module")
def model() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "triton_python_backend_utils", backend())
        patch.delitem(sys.modules, "cvx_deploy.serve.triton.model", raising=False)
        from cvx_deploy.serve.triton.model import TritonPythonModel

        running = TritonPythonModel()
        running.initialize(arguments(plain(config_text(miniature("mini"), "onnxruntime", ONE_THREAD))))
        yield running
        running.finalize()
        patch.delitem(sys.modules, "cvx_deploy.serve.triton.model")


def asked(model: Any, **values: Any) -> Request:
    request = Request(**values)
    assert model.execute([request]) is None
    return request


def test_the_config_is_one_by_tritons_schema() -> None:
    config = parsed(config_text(miniature("mini"), "onnxruntime", ONE_THREAD))
    assert (config.name, config.backend, config.model_transaction_policy.decoupled) == ("mini", "python", True)
    assert [(one.name, one.optional) for one in config.input] == [(name, name != "prompt") for name in INPUTS]
    assert {name: one.string_value for name, one in config.parameters.items()} == {
        "bundle": str(miniature("mini").absolute()),
        "engine": "onnxruntime",
        "threads": "1",
    }
    strange = Path('/tmp/a "b" \\ \n ü/5b')
    assert parsed(config_text(strange, "tensorrt", EngineOptions())).parameters["bundle"].string_value == str(strange)
    with pytest.raises(Exception, match="inputs"):  # the twin
        parsed(config_text(strange, "tensorrt", EngineOptions()).replace("input {", "inputs {", 1))


def test_a_request_is_answered_by_each_step_and_the_bytes_of_the_python_api(model: Any, tmp_path: Path) -> None:
    request = asked(model, **FEW)
    told = [json.loads(answer.values["event"]) for answer in request.answers]
    assert [one["event"] for one in told] == [*["step"] * 4, "frames", "completed"]
    assert [one["index"] for one in told[:4]] == [0, 1, 2, 3]
    assert told[-1] == {"event": "completed", "seed": 7, "size": "48x48"}
    assert request.final == [False] * 5 + [True]
    with Pipeline.from_pretrained("mini", threads=1) as pipe:
        pipe(**FEW).save(tmp_path / "own.mp4")
    assert request.answers[-1].values["video"] == (tmp_path / "own.mp4").read_bytes()
    other = asked(model, **{**FEW, "seed": 8})
    assert other.answers[-1].values["video"] != request.answers[-1].values["video"], "the twin"
    again = asked(model, **FEW, video=request.answers[-1].values["video"], strength=0.5)
    assert [json.loads(one.values["event"])["event"] for one in again.answers[:3]] == ["step", "step", "frames"]


def test_a_cancelled_request_stops_at_its_next_step_and_the_next_one_is_made(model: Any) -> None:
    request = asked(model, **{**FEW, "num_inference_steps": 500}, cancelled_after=2)
    assert request.error.code == TritonError.CANCELLED
    assert len(request.answers) == 3
    assert asked(model, **FEW).answers[-1].error is None


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"prompt": " "}, "prompt is empty"),
        ({"prompt": b"\xff"}, "prompt is not Unicode"),
        ({"num_inference_steps": 0}, "0 steps"),
        ({"size": "64x64"}, "use 48x48"),
        ({"fps": 0}, "fps"),
        ({"strength": 0.5}, "without a video"),
        ({"guidance_scale": float("nan")}, "guidance"),
        ({"cache": "none"}, "cache"),
        ({"image": picture()}, "image"),
        ({"video": b"nothing"}, "video"),
        ({"video": b"nothing", "image": picture()}, "send one of them"),
    ],
)
def test_what_makes_no_sense_is_refused_with_a_way_to_mend_it(model: Any, wrong: dict[str, Any], message: str) -> None:
    error = asked(model, **{**FEW, **wrong}).error
    assert error.code == TritonError.INVALID_ARG, error.message
    assert message in error.message
    assert "fix: " in error.message
    assert "/tmp" not in error.message


def test_a_video_of_several_clips_is_refused(model: Any) -> None:
    other = type(model)()
    words = arguments(plain(config_text(miniature("mini-i2v"), "onnxruntime", ONE_THREAD)))
    other.initialize({**words, "model_name": "mini-i2v"})
    error = asked(other, **FEW, image=picture(), num_frames=17).error
    assert (error.code, "of 9 frames" in error.message) == (TritonError.INVALID_ARG, True), error.message
    other.finalize()


def test_a_fault_ends_one_request(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(model._pipeline, "stream", lambda **_: 1 / 0)
        error = asked(model, **FEW).error
    assert error.code == TritonError.INTERNAL
    assert "a fault of cvx-deploy" in error.message
    assert asked(model, **FEW).answers[-1].error is None


def test_a_bundle_that_has_gone_keeps_the_model_from_becoming_ready(model: Any) -> None:
    failure = sys.modules["triton_python_backend_utils"].TritonModelException
    for text in (config_text(Path("/nowhere/5b"), "onnxruntime", ONE_THREAD), ""):
        with pytest.raises(failure, match="fix: "):
            type(model)().initialize(arguments(plain(text)))


def test_an_earlier_model_goes_only_by_force_and_that_of_others_never(tmp_path: Path) -> None:
    command = ("triton", "--model", "mini", "--output", tmp_path)
    made = cvx(*command, "--json")
    folder = tmp_path / "mini"
    assert json.loads(made.out) == {"model": "mini", "folder": str(folder), "engine": "onnxruntime"}
    before = (folder / "config.pbtxt").read_bytes()
    assert "add --force" in cvx(*command, "--threads", 3).failure()
    assert (folder / "config.pbtxt").read_bytes() == before
    assert cvx(*command, "--threads", 3, "--force").out.strip() == str(folder)
    assert b'"3"' in (folder / "config.pbtxt").read_bytes()
    (folder / "config.pbtxt").write_text('name: "mini"\n')
    assert "was not written by this command" in cvx(*command, "--force").failure()
    assert {path.name for path in tmp_path.iterdir()} == {"mini"}


def documented_client() -> str:
    text = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    return next(block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "tritonclient" in block)


@pytest.fixture
def triton(tmp_path: Path) -> Iterator[str]:
    """Run the server that nvidia-pytriton brings on a repository with the miniature, and give its gRPC address."""
    assert ENVIRONMENT is not None
    python = Path(ENVIRONMENT) / "bin" / "python"
    code = "from importlib.util import find_spec as find; print(find('pytriton').submodule_search_locations[0])"
    home = Path(subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip())
    brought = home / "tritonserver"
    backends = tmp_path / "backends" / "python"
    backends.parent.mkdir()
    subprocess.run(["cp", "-r", brought / "backends" / "python", backends], check=True)
    subprocess.run(
        [
            "cp",
            brought
            / "python_backend_stubs"
            / home.parents[1].name.removeprefix("python")
            / "triton_python_backend_stub",
            backends,
        ],
        check=True,
    )
    write_model(Bundle.open(miniature("mini")), "onnxruntime", ONE_THREAD, tmp_path / "models", replace=False)
    options = {"model-repository": tmp_path / "models", "backend-directory": backends.parent, "allow-metrics": "false"}
    options |= {"http-port": 18090, "grpc-port": 18091}
    environment = {**os.environ, "PATH": f"{python.parent}:{os.environ['PATH']}"}
    environment["LD_LIBRARY_PATH"] = str(home.parent / "nvidia_pytriton.libs")
    command = [str(brought / "bin" / "tritonserver"), *(f"--{name}={value}" for name, value in options.items())]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=tmp_path)
    try:
        until(lambda: process.poll() is not None or answers("http://127.0.0.1:18090/v2/health/ready"))
        assert process.poll() is None, (tmp_path / "log").read_text()
        yield "127.0.0.1:18091"
    finally:
        process.kill()
        process.wait()


def answers(address: str) -> bool:
    try:
        return httpx.get(address).status_code == 200
    except httpx.HTTPError:
        return False


@pytest.mark.nightly
@pytest.mark.skipif(ENVIRONMENT is None, reason="CVX_TRITON_ENV names no environment with nvidia-pytriton")
def test_the_documented_client_gets_the_video_from_tritonserver_and_a_cancelled_one_frees_it(
    triton: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    client = documented_client().replace("localhost:8001", triton)
    started = time.monotonic()
    exec(compile(client, "client", "exec"), {})
    took = time.monotonic() - started  # 50 steps
    told = [
        json.loads(line.replace("'", '"').replace("False", "false")) for line in capsys.readouterr().out.splitlines()
    ]
    assert [one["event"] for one in told][-2:] == ["frames", "completed"]
    with Pipeline.from_pretrained("mini", threads=1) as pipe:
        pipe(PROMPT, seed=7).save("own.mp4")
    assert Path("circle.mp4").read_bytes() == Path("own.mp4").read_bytes()

    import tritonclient.grpc as grpc

    heard: queue.Queue[Any] = queue.Queue()
    prompt = grpc.InferInput("prompt", [1], "BYTES")
    prompt.set_data_from_numpy(np.array([PROMPT.encode()], dtype=object))
    steps = grpc.InferInput("num_inference_steps", [1], "INT32")
    steps.set_data_from_numpy(np.array([500], dtype=np.int32))
    with grpc.InferenceServerClient(triton) as waiting:
        waiting.start_stream(lambda result, error: heard.put((result, error)))
        waiting.async_stream_infer("mini", [prompt, steps])
        assert heard.get(timeout=60)[1] is None
        waiting.stop_stream(cancel_requests=True)
    started = time.monotonic()
    exec(compile(client, "client", "exec"), {})
    assert time.monotonic() - started < 4 * took, "500 steps would take ten times as long"
