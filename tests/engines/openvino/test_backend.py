"""OpenVINO on the CPU: what it computes in each precision, what it refuses, and where its weights lie."""

import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import pytest
from numpy.typing import NDArray

from cvx_deploy.bundle.opened import Bundle
from cvx_deploy.doctor import diagnose
from cvx_deploy.engines.backend import Backend, Session
from cvx_deploy.engines.onnxruntime.backend import OrtBackend
from cvx_deploy.engines.openvino import backend as backend_of
from cvx_deploy.engines.openvino.backend import OpenVinoBackend, precisions
from cvx_deploy.engines.registry import open_backend
from cvx_deploy.errors import EngineError
from cvx_deploy.install import pip_install
from cvx_deploy.miniatures import miniature
from cvx_deploy.pipeline.request import RunRequest
from cvx_deploy.pipeline.run import run
from tests.command import cvx
from tests.conftest import Exported
from tests.parity.corrupt import corrupted
from tests.tolerances import BF16_RELATIVE, NETWORK_RELATIVE, PIXELS_ABSOLUTE

SIZES = {"batch": 1, "latent_height": 4, "latent_width": 4}
WORDS = 100
PROMPT = ("--prompt", "a red circle moves to the right", "--steps", "2")
needs_bf16 = pytest.mark.skipif("bf16" not in precisions(), reason="this CPU does not compute in bf16")


@pytest.fixture
def mini() -> Bundle:
    return Bundle.open(miniature("mini"))


def outputs(backend: Backend, role: str) -> dict[str, NDArray[Any]]:
    """Run a network on the same random values each time."""
    rng = np.random.default_rng(0)
    inputs: dict[str, NDArray[Any]] = {}
    for spec in backend.bundle.network(role).inputs:
        shape = spec.resolve(SIZES)
        whole = spec.dtype == "int64"
        inputs[spec.name] = rng.integers(0, WORDS, shape) if whole else rng.standard_normal(shape).astype(spec.dtype)
    if "timestep" in inputs:
        inputs["timestep"][:] = 999
    with backend.load(role, SIZES) as session:
        return {name: backend.to_host(value) for name, value in session.run(inputs).items()}


def error(found: Bundle, reference: Bundle, role: str) -> float:
    """Return the largest difference from ONNX Runtime over the largest value, of all outputs of a network."""
    ours, theirs = outputs(OpenVinoBackend(found, 1), role), outputs(OrtBackend(reference, 1), role)
    assert ours.keys() == theirs.keys()
    return max(float(np.abs(ours[name] - theirs[name]).max() / np.abs(theirs[name]).max()) for name in theirs)


def test_every_network_is_what_onnxruntime_computes(exported: Exported) -> None:
    bundle = exported("1.5-5b-i2v")
    for role in bundle.manifest.networks:
        assert error(bundle, bundle, role) < NETWORK_RELATIVE, role


@pytest.mark.parametrize(
    ("component", "tensor", "role"),
    [
        ("text_encoder", "encoder.block.0.layer.0.SelfAttention.q.weight", "text_encoder"),
        ("transformer", "transformer_blocks.1.attn1.to_k.weight", "transformer"),
        ("vae", "decoder.up_blocks.1.resnets.0.conv1.conv.weight", "vae_decoder_first"),
    ],
)
def test_twin_a_changed_weight_is_found(
    component: str, tensor: str, role: str, exported: Exported, tmp_path: Path
) -> None:
    bundle = exported("5b")
    assert error(corrupted(bundle, component, tensor, tmp_path), bundle, role) > NETWORK_RELATIVE


def test_weights_that_stay_in_their_file_are_the_same(exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = exported("5b")
    expected = outputs(OpenVinoBackend(bundle, 1), "modulation")["modulation"]
    monkeypatch.setattr("cvx_deploy.engines.openvino.spec.LARGE_NETWORK", 0)
    monkeypatch.setattr("cvx_deploy.graph.streamed._LARGE", 1)
    backend = OpenVinoBackend(bundle, 1)
    model, _ = backend._model(bundle, "modulation")
    assert len(model.inputs) > len(bundle.network("modulation").inputs), "none stayed"
    assert np.abs(outputs(backend, "modulation")["modulation"] - expected).max() < NETWORK_RELATIVE


@needs_bf16
def test_a_bf16_bundle_is_near_the_fp32_one(exported: Exported) -> None:
    bundle, reference = exported("5b", precision="bf16"), exported("5b")
    errors = {role: error(bundle, reference, role) for role in bundle.manifest.networks}
    assert max(errors.values()) < BF16_RELATIVE, errors
    assert min(errors.values()) > NETWORK_RELATIVE, "it was computed in fp32"


def test_a_whole_video_is_that_of_onnxruntime(mini: Bundle, tmp_path: Path) -> None:
    videos = []
    for name, backend in (("openvino", OpenVinoBackend(mini, 1)), ("onnxruntime", OrtBackend(mini, 1))):
        run(backend, RunRequest((PROMPT[1],), tmp_path / f"{name}.npy", steps=3))
        videos.append(np.load(tmp_path / f"{name}.npy"))
    assert np.abs(videos[0] - videos[1]).max() < PIXELS_ABSOLUTE


def test_outputs_of_one_run_stay_as_they_are_in_the_next(mini: Bundle) -> None:
    ids = [np.full((1, mini.manifest.text_length), token, np.int64) for token in (1, 5)]
    with OpenVinoBackend(mini, 1).load("text_encoder", {"batch": 1}) as session:
        first = session.run({"input_ids": ids[0]})["prompt_embeds"]
        before = first.copy()
        second = session.run({"input_ids": ids[1]})["prompt_embeds"]
    assert np.array_equal(first, before)
    assert not np.array_equal(second, before)


def test_the_command_line_runs_it_and_says_in_which_precision(tmp_path: Path) -> None:
    done = cvx("run", *PROMPT, "--engine", "openvino", "--threads", "1", "--output", tmp_path / "out.npy", "--json")
    assert done.code == 0, done
    assert '"engine": "openvino"' in done.out
    assert '"precision": "fp32"' in done.out


def test_a_cpu_without_a_precision_refuses_it(exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend_of, "precisions", lambda: ["fp32"])
    with pytest.raises(EngineError, match="bf16, which this CPU has no instructions for") as raised:
        OpenVinoBackend(exported("5b", precision="bf16"))
    assert "--precision fp32" in raised.value.fix


def test_without_openvino_the_extra_is_named(mini: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delitem(sys.modules, "cvx_deploy.engines.openvino.backend")
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(EngineError, match="openvino is not installed") as raised, open_backend("openvino", mini):
        pass
    assert raised.value.fix == pip_install("openvino")
    [found] = [one for one in diagnose(tmp_path).findings if one.subject == "openvino" and one.state == "note"]
    assert found.fix == pip_install("openvino")


def test_what_openvino_cannot_read_is_said_in_one_line(mini: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("Exception from src/core.cpp:1:\nCheck 'false' failed at x.cpp:2:\nno such operator\n\n")

    monkeypatch.setattr(openvino.Core, "compile_model", broken)
    with (
        pytest.raises(EngineError, match=r"^OpenVINO cannot load transformer: no such operator"),
        OpenVinoBackend(mini).load("transformer", SIZES),
    ):
        pass


def test_a_tensor_of_another_shape_is_said_in_one_line(mini: Bundle) -> None:
    with (
        OpenVinoBackend(mini, 1).load("text_encoder", SIZES) as session,
        pytest.raises(EngineError, match=r"^OpenVINO failed in text_encoder: "),
    ):
        session.run({"input_ids": np.zeros((3, 3), np.int64)})


def run_for_ever(session: Session, inputs: dict[str, NDArray[Any]]) -> None:
    while True:
        session.run(inputs)


def test_an_interrupt_stops_in_the_middle_of_a_run(mini: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend_of, "_POLL_MS", 0)
    ids = np.zeros((1, mini.manifest.text_length), np.int64)

    def interrupt() -> None:
        time.sleep(0.2)
        signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with OpenVinoBackend(mini, 1).load("text_encoder", SIZES) as session:
            threading.Thread(target=interrupt).start()
            with pytest.raises(KeyboardInterrupt):
                run_for_ever(session, {"input_ids": ids})
            assert np.isfinite(session.run({"input_ids": ids})["prompt_embeds"]).all()
    finally:
        signal.signal(signal.SIGINT, before)
