"""ONNX Runtime on a GPU, up to its bindings: what is copied, what stays there, and what is said when it cannot be."""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnxruntime.capi import onnxruntime_pybind11_state as native

from cvx_deploy.bundle.opened import Bundle
from cvx_deploy.engines.onnxruntime import backend as backend_module
from cvx_deploy.engines.onnxruntime.backend import OrtBackend, OrtSession
from cvx_deploy.engines.onnxruntime.convolution import check_convolution
from cvx_deploy.engines.onnxruntime.graphs import graph_for_cuda
from cvx_deploy.errors import EngineError, OutOfMemoryError
from cvx_deploy.install import pip_install
from cvx_deploy.miniatures import miniature
from cvx_deploy.pipeline import vae
from cvx_deploy.pipeline.request import RunRequest
from cvx_deploy.pipeline.run import run
from cvx_deploy.progress import SilentProgress
from tests.conftest import Exported, in_precision
from tests.engines.onnxruntime.fake_onnxruntime import NO_CUDNN, FakeOnnxRuntime
from tests.tolerances import PIXELS_ABSOLUTE

STEPS = 3
CHUNKS = 3
THREADS = 1  # two that wait for each other lose time where tests run side by side
TRANSFORMER = ("transformer", {"batch": 1})


@pytest.fixture
def mini() -> Bundle:
    return Bundle.open(miniature("mini"))


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeOnnxRuntime:
    return FakeOnnxRuntime(monkeypatch)


def video(backend: OrtBackend, folder: Path) -> NDArray[np.float32]:
    run(backend, RunRequest(("a red circle moves to the right",), folder / "out.npy", steps=STEPS))
    return np.load(folder / "out.npy")


def decoded(backend: OrtBackend) -> NDArray[np.float32]:
    """Decode a clip of several chunks."""
    size = (1, backend.bundle.manifest.vae.latent_channels, 3 + 2 * (CHUNKS - 1), 4, 4)
    latents = np.random.default_rng(0).standard_normal(size).astype(np.float32)
    return np.concatenate(list(vae.decode(backend, latents, tiled=False, advance=lambda _: None)), axis=2)


def check_state_stays(fake: FakeOnnxRuntime, bundle: Bundle) -> None:
    """Make sure that each cache a run takes is what an earlier run put out, and was never copied to the host."""
    state = bundle.network("vae_decoder_next").state
    taken = [event.value for event in fake.events if event.what == "input" and event.name in state]
    assert len(taken) == (CHUNKS - 1) * len(state)
    assert len(set(taken)) == len(taken)
    copied = {event.value for event in fake.events if event.what in ("upload", "download")}
    assert not copied & set(taken)


def test_a_whole_run_copies_only_what_is_new_and_gives_what_the_cpu_gives(
    mini: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = video(OrtBackend(mini, THREADS), tmp_path)
    fake = FakeOnnxRuntime(monkeypatch, device=1)
    found = video(OrtBackend(mini, THREADS, device=1), tmp_path)
    assert np.abs(found - expected).max() < PIXELS_ABSOLUTE  # the CPU's graph has operators of its own
    probe = ["upload"]
    prompt = ["upload", "input input_ids", "output prompt_embeds", "run", "download"]
    modulation = ["upload", "input timestep", "output modulation", "run", "download"]
    step = ["upload", "upload", "input hidden_states", "input encoder_hidden_states", "input modulation"]
    step += ["output noise_pred", "run", "download"]
    frames = ["load", "upload", "input latents", "output pixels", "run", "download"]
    steps = ["load", *(modulation * STEPS), "load", "upload", *(step * STEPS)]
    assert fake.words() == [*probe, "load", *prompt, *prompt, *steps, *frames]


def test_prompt_embeddings_are_copied_once_for_all_steps(fake: FakeOnnxRuntime, mini: Bundle, tmp_path: Path) -> None:
    video(OrtBackend(mini, THREADS, device=0), tmp_path)
    taken = [event.value for event in fake.events if event.name == "encoder_hidden_states"]
    assert len(taken) == STEPS
    assert len(set(taken)) == 1


def test_caches_never_leave_the_gpu(exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = exported("1.5-5b")
    expected = decoded(OrtBackend(bundle, THREADS))
    fake = FakeOnnxRuntime(monkeypatch)
    assert np.array_equal(decoded(OrtBackend(bundle, THREADS, device=0)), expected)
    check_state_stays(fake, bundle)


def test_twin_a_cache_that_is_copied_to_the_host_is_found(
    exported: Exported, fake: FakeOnnxRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, run_on_gpu = exported("1.5-5b"), OrtSession.run

    def run_through_the_host(session: OrtSession, inputs: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value.numpy() for name, value in run_on_gpu(session, inputs).items()}

    monkeypatch.setattr(OrtSession, "run", run_through_the_host)
    monkeypatch.setattr(OrtBackend, "to_host", lambda _, array: array)
    decoded(OrtBackend(bundle, THREADS, device=0))
    with pytest.raises(AssertionError):
        check_state_stays(fake, bundle)


def test_outputs_of_one_run_stay_as_they_are_in_the_next(mini: Bundle) -> None:
    backend = OrtBackend(mini, THREADS)
    ids = [np.full((1, mini.manifest.text_length), token, np.int64) for token in (1, 5)]
    with backend.load("text_encoder", {"batch": 1}) as session:
        outputs = [session.run({"input_ids": each})["prompt_embeds"] for each in ids]
        before = backend.to_host(outputs[0]).copy()
        session.run({"input_ids": ids[1]})
    assert np.array_equal(backend.to_host(outputs[0]), before)
    assert not np.array_equal(backend.to_host(outputs[1]), before)


def test_the_cuda_provider_is_asked_for_with_its_device(fake: FakeOnnxRuntime, mini: Bundle) -> None:
    with OrtBackend(mini, THREADS, device=0).load(*TRANSFORMER):
        [[(name, options)]] = fake.providers
    assert name == "CUDAExecutionProvider"
    assert options == {
        "device_id": "0",
        "arena_extend_strategy": "kSameAsRequested",
        "cudnn_conv_algo_search": "HEURISTIC",
        "use_tf32": "0",
    }


def operators(graph: bytes) -> set[str]:
    return {node.op_type for node in onnx.ModelProto.FromString(graph).graph.node}


def test_a_gpu_is_given_whole_norms_and_no_memory_laid_out_beforehand(
    fake: FakeOnnxRuntime, exported: Exported
) -> None:
    bundle = exported("5b", precision="fp16")
    assert "LayerNormalization" not in operators(bundle.onnx_path("transformer").read_bytes())
    with OrtBackend(bundle, THREADS, device=0).load(*TRANSFORMER):
        pass
    assert "LayerNormalization" in operators(fake.graphs[-1])
    assert fake.patterns == [False]


def test_frames_of_bfloat16_are_moved_in_float32_on_a_gpu(exported: Exported) -> None:
    bundle = exported("5b", precision="bf16")
    stored = bundle.onnx_path("vae_decoder_first").read_bytes()
    given = graph_for_cuda(stored, bundle.network("vae_decoder_first"))
    before, after = (onnx.ModelProto.FromString(graph).graph.node for graph in (stored, given))
    moves = sum(node.op_type in ("Resize", "Pad") for node in before)
    casts = [sum(node.op_type == "Cast" for node in nodes) for nodes in (before, after)]
    assert casts[1] >= casts[0] + 2 * moves > casts[0]
    plain = Bundle.open(miniature("mini"))
    stored = plain.onnx_path("vae_decoder_first").read_bytes()
    assert graph_for_cuda(stored, plain.network("vae_decoder_first")) is stored, "float32 is not even read"


def test_a_missing_cudnn_is_stated_before_anything_is_loaded(fake: FakeOnnxRuntime, mini: Bundle) -> None:
    check_convolution(0)
    fake.failures["run"] = NO_CUDNN
    with pytest.raises(EngineError) as raised:
        check_convolution(0)
    assert raised.value.what.startswith("ONNX Runtime cannot convolve on GPU 0: cuDNN is unavailable or disabled")
    assert "which brings cuDNN along" in raised.value.fix


def test_quantized_layers_in_bf16_are_refused_at_once_and_in_fp16_said_to_be_widened(
    fake: FakeOnnxRuntime, exported: Exported
) -> None:
    with pytest.raises(EngineError, match="quantized and computes in bf16: ONNX") as raised:
        OrtBackend(exported("5b", precision="int8wo/bf16"), THREADS, device=0)
    assert "--precision int8wo/fp16" in raised.value.fix
    notes = Notes()
    with OrtBackend(exported("5b", precision="int8wo/fp32"), THREADS, notes, device=0).load(*TRANSFORMER):
        [note] = notes.notes
    assert "multiplies the int8wo layers of transformer in fp32 on a GPU" in note


@pytest.mark.parametrize(("overflows", "said"), [(True, "1"), (False, "")])
def test_sums_are_kept_from_overflowing_only_where_they_would(
    overflows: bool, said: str, exported: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend_module, "overflows_in_int8", lambda: overflows)
    bundle, name = exported("5b", precision="int8wo/fp32"), "session.x64quantprecision"
    for scheme, expected in {"int8": said, "int8wo": ""}.items():
        network = in_scheme(bundle, scheme).network("transformer")
        assert (
            entry(
                OrtBackend(bundle, THREADS)._options("transformer", replace(network, weights=()), {"batch": 1}, []),
                name,
            )
            == expected
        )


def in_scheme(bundle: Bundle, scheme: Any) -> Bundle:
    """Return a bundle whose manifest says that its quantized networks are so in another scheme."""
    networks = {
        name: network
        if network.quantization is None
        else replace(network, quantization=replace(network.quantization, scheme=scheme))
        for name, network in bundle.manifest.networks.items()
    }
    return replace(bundle, manifest=replace(bundle.manifest, networks=networks))


def entry(options: onnxruntime.SessionOptions, name: str) -> str:
    """Return a setting of a session; empty where it was not set."""
    try:
        return str(options.get_session_config_entry(name))
    except RuntimeError:
        return ""


@pytest.mark.parametrize(
    ("error", "fix"),
    [
        (RuntimeError("no OrtValue of that kind"), "report this"),
        (native.Fail("CUDA failure 700: an illegal memory access was encountered"), "nvidia-smi"),
        (native.InvalidGraph("This is an invalid model"), "cvx-deploy verify"),
    ],
)
def test_only_a_bundle_that_is_wrong_is_to_be_exported_again(
    error: Exception, fix: str, fake: FakeOnnxRuntime, mini: Bundle
) -> None:
    backend = OrtBackend(mini, THREADS, device=0)
    fake.failures["run"] = error
    ids = np.zeros((1, mini.manifest.text_length), np.int64)
    with backend.load("text_encoder", {"batch": 1}) as session, pytest.raises(EngineError) as raised:
        session.run({"input_ids": ids})
    assert fix in raised.value.fix
    assert ("export" in raised.value.fix) == (fix == "export the bundle again")


class Notes(SilentProgress):
    """Keeps the notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def test_operators_that_are_left_to_the_cpu_are_told(fake: FakeOnnxRuntime, mini: Bundle) -> None:
    notes = Notes()
    backend = OrtBackend(mini, THREADS, notes, device=0)
    with backend.load(*TRANSFORMER):
        assert not notes.notes
    fake.on_cpu = {"Gemm", "Sin"}
    with backend.load("modulation", {}):
        [note] = notes.notes
    assert re.fullmatch(r"note: the CPU runs 20 of the \d+ operators of modulation: 19 Gemm, 1 Sin", note)


@pytest.mark.usefixtures("fake")
def test_an_onnxruntime_that_cannot_tell_is_too_old(mini: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "InferenceSession", object)
    with pytest.raises(EngineError, match="too old"):
        OrtBackend(mini, THREADS, device=0)


def test_bf16_runs_on_a_gpu_and_not_on_the_cpu(fake: FakeOnnxRuntime, mini: Bundle) -> None:
    bf16 = in_precision(mini, "bf16")
    assert OrtBackend(bf16, device=0).bundle is bf16
    with pytest.raises(EngineError, match="no CPU kernels"):
        OrtBackend(bf16)


def test_what_cuda_has_no_kernels_for_is_stated_in_one_line(fake: FakeOnnxRuntime, mini: Bundle) -> None:
    reason = "[ONNXRuntimeError] : 9 : NOT_IMPLEMENTED : Could not find an implementation for Conv(11)"
    fake.failures["load"] = native.NotImplemented(f"{reason}\nand more")
    with pytest.raises(EngineError) as raised, OrtBackend(mini, THREADS, device=0).load(*TRANSFORMER):
        pass
    assert raised.value.what == f"ONNX Runtime cannot load transformer: {reason}"
    assert "--precision fp16" in raised.value.fix


@pytest.mark.parametrize("where", ["load", "upload", "run"])
@pytest.mark.parametrize(
    "reason",
    [
        "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Failed to allocate memory for requested buffer of size 99",
        "CUDA failure 2: out of memory ; GPU=0",
        "CUBLAS failure 3: CUBLAS_STATUS_ALLOC_FAILED",
    ],
)
def test_out_of_memory_is_stated_as_such(where: str, reason: str, fake: FakeOnnxRuntime, mini: Bundle) -> None:
    backend = OrtBackend(mini, THREADS, device=0)
    fake.failures[where] = native.RuntimeException(reason)
    ids = np.zeros((1, mini.manifest.text_length), np.int64)
    with (
        pytest.raises(OutOfMemoryError, match=r"^ONNX Runtime .*, out of memory: "),
        backend.load("text_encoder", {"batch": 1}) as session,
    ):
        session.run({"input_ids": ids})


def test_a_copy_that_fails_is_stated(fake: FakeOnnxRuntime, mini: Bundle) -> None:
    backend = OrtBackend(mini, THREADS, device=0)
    tensor = backend.to_device(np.zeros(3, np.float32))
    fake.failures |= {what: RuntimeError("CUDA failure 700: illegal access") for what in ("upload", "download")}
    with pytest.raises(EngineError, match="cannot copy to the GPU: CUDA failure 700"):
        backend.to_device(np.zeros(3, np.float32))
    with pytest.raises(EngineError, match="cannot copy from the GPU: CUDA failure 700"):
        backend.to_host(tensor)


def test_an_onnxruntime_without_cuda_says_which_package_has_it(mini: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(EngineError, match="has no CUDA") as raised:
        OrtBackend(mini, THREADS, device=0)
    assert "onnxruntime-gpu" in raised.value.fix


def test_a_gpu_that_cannot_be_used_is_stated_before_anything_is_loaded(fake: FakeOnnxRuntime, mini: Bundle) -> None:
    place = (
        "/onnxruntime_src/core/session/provider_bridge_ort.cc:2465 onnxruntime::ProviderInfo_CUDA& onnxruntime::Get() "
    )
    fake.failures["upload"] = RuntimeError(f"{place}CUDA Provider not available\n")
    with pytest.raises(EngineError) as raised:
        OrtBackend(mini, THREADS, device=0)
    assert raised.value.what == "ONNX Runtime cannot use GPU 0: CUDA Provider not available"
    assert not fake.providers


def test_a_missing_library_is_named_and_nothing_else_is_printed(
    fake: FakeOnnxRuntime, mini: Bundle, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: print("Failed to load libcublas.so.13: no such file"))
    fake.failures["upload"] = RuntimeError("CUDA Provider not available")
    with pytest.raises(EngineError, match=r"GPU 0: Failed to load libcublas\.so\.13") as raised:
        OrtBackend(mini, THREADS, device=0)
    assert pip_install("gpu") in raised.value.fix
    assert capsys.readouterr().out == ""


def test_a_session_that_went_to_the_cpu_silently_is_refused(fake: FakeOnnxRuntime, mini: Bundle) -> None:
    backend = OrtBackend(mini, THREADS, device=0)
    fake.usable = False
    with pytest.raises(EngineError, match="would run transformer on the CPU"), backend.load(*TRANSFORMER):
        pass
