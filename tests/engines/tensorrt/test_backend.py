"""The TensorRT backend, up to the driver: a fake driver and a fake library, whose engines compute with ONNX Runtime."""

import functools
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from cvx_deploy.bundle.opened import Bundle
from cvx_deploy.bundle.schema import StoredFile
from cvx_deploy.engines.onnxruntime.backend import OrtBackend
from cvx_deploy.engines.tensorrt.backend import TensorRtBackend
from cvx_deploy.engines.tensorrt.cuda_graphs import Launcher
from cvx_deploy.engines.tensorrt.device_memory import DeviceMemory, Upload
from cvx_deploy.engines.tensorrt.libraries import EngineKind
from cvx_deploy.engines.tensorrt.session import TrtSession
from cvx_deploy.engines.tensorrt.store import EngineKey, EngineRecord, EngineStore
from cvx_deploy.errors import EngineError, OutOfMemoryError
from cvx_deploy.files import sha256_of
from cvx_deploy.miniatures import miniature
from cvx_deploy.pipeline import vae
from cvx_deploy.pipeline.request import RunRequest
from cvx_deploy.pipeline.run import run
from cvx_deploy.progress import SilentProgress
from tests.conftest import Exported
from tests.engines.fake_cuda import FakeCuda, MisuseError
from tests.engines.tensorrt.fake_tensorrt import EngineFacts, FakeStore, Networks, compiled_kernels, fake_library

PROMPT = "a red circle moves to the right"
STEPS = 3
CHUNKS = 5  # of the decoder, the first one and four that are alike
TRANSFORMER = ("transformer", {"batch": 1})


class Notes(SilentProgress):
    """Keeps the notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


@functools.cache
def networks_of(bundle: Path) -> Networks:
    return Networks(Bundle.open(bundle))


@pytest.fixture
def mini() -> Bundle:
    return Bundle.open(miniature("mini"))


@pytest.fixture
def chunked(exported: Exported) -> Bundle:
    """A bundle whose VAE works through several chunks."""
    return exported("1.5-5b")


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> NDArray[np.float32]:
    """What ONNX Runtime makes of the prompt."""
    return video(OrtBackend(Bundle.open(miniature("mini"))), tmp_path_factory.mktemp("ort"))


Make = Callable[..., TensorRtBackend]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Return a function that makes a backend on a fake driver."""

    def backend(
        bundle: Bundle,
        cuda: FakeCuda,
        *,
        kind: EngineKind = "tensorrt-rtx",
        facts: dict[str, dict[str, int]] | None = None,
        **options: Any,
    ) -> TensorRtBackend:
        store: Any = FakeStore(tmp_path, **(facts or {}))
        return TensorRtBackend(bundle, fake_library(cuda, networks_of(bundle.path), kind), cuda, store, **options)

    return backend


def video(backend: Any, folder: Path, **request: Any) -> NDArray[np.float32]:
    run(backend, RunRequest(output=folder / "out.npy", **{"prompts": (PROMPT,), "steps": STEPS, **request}))
    return np.load(folder / "out.npy")


def transformer_inputs(bundle: Bundle, seed: int = 0, batch: int = 1) -> dict[str, NDArray[Any]]:
    rng = np.random.default_rng(seed)
    return {
        spec.name: rng.standard_normal(spec.resolve({"batch": batch})).astype(np.float32)
        for spec in bundle.network("transformer").inputs
    }


def latents_for(bundle: Bundle, chunks: int, seed: int = 0) -> vae.Clip:
    size = (1, bundle.manifest.vae.latent_channels, 3 + 2 * (chunks - 1), 4, 4)
    return np.random.default_rng(seed).standard_normal(size).astype(np.float32)


def decoded(backend: Any, latents: vae.Clip) -> NDArray[np.float32]:
    return np.concatenate(list(vae.decode(backend, latents, tiled=False, advance=lambda _: None)), axis=2)


@pytest.fixture
def expected_pixels(chunked: Bundle) -> Callable[[vae.Clip], NDArray[np.float32]]:
    return functools.partial(decoded, OrtBackend(chunked))


@pytest.mark.parametrize("kind", ["tensorrt", "tensorrt-rtx"])
@pytest.mark.parametrize("graphs", [True, False])
def test_a_whole_run_gives_bit_for_bit_what_onnx_runtime_gives(
    kind: EngineKind, graphs: bool, mini: Bundle, make: Make, expected: NDArray[np.float32], tmp_path: Path
) -> None:
    cuda = FakeCuda()
    with make(mini, cuda, kind=kind, cuda_graphs=graphs) as backend:
        found = video(backend, tmp_path)
    assert np.array_equal(found, expected)
    assert bool(cuda.calls("capture")) == graphs
    cuda.assert_clean()


def test_each_step_costs_two_small_uploads_one_launch_and_one_download(
    mini: Bundle, make: Make, tmp_path: Path
) -> None:
    cuda = FakeCuda()
    with make(mini, cuda) as backend:
        video(backend, tmp_path)
    start = next(index for index, entry in enumerate(cuda.log) if entry[:2] == ("bind", "transformer"))
    names = [entry[0] for entry in cuda.log[start:] if entry[0] not in ("bind", "run")]
    first, second, third = ["enqueue"], ["capture", "launch"], ["launch"]
    up, down = ["copy_to_device"] * 2, ["copy_to_host"]
    assert names[: 4 + 2 + 3 + 2 + 1] == [*first, *down, *up, *second, *down, *up, *third, *down, "malloc"]
    prompt = next(entry[3] for entry in cuda.log if entry[1:3] == ("transformer", "encoder_hidden_states"))
    assert sum(address == prompt for address, _ in cuda.calls("copy_to_device")) == 1, "uploaded once for all steps"


def test_caches_never_leave_the_device(
    chunked: Bundle, make: Make, expected_pixels: Callable[[vae.Clip], NDArray[np.float32]]
) -> None:
    cuda, latents = FakeCuda(), latents_for(chunked, CHUNKS)
    with make(chunked, cuda) as backend:
        assert np.array_equal(decoded(backend, latents), expected_pixels(latents))
    cuda.assert_clean()
    state = chunked.network("vae_decoder_next").state
    taken = {name: [a for _, other, a in cuda.calls("bind") if other == name] for name in state}
    given = {name: [a for _, other, a in cuda.calls("bind") if other == name] for name in state.values()}
    for name, output in state.items():
        assert taken[name] == given[output][: len(taken[name])], "each run reads what the one before wrote"
        assert len({*taken[name], *given[output]}) == 2, "in two places, whatever the number of chunks"
    caches = {address for addresses in taken.values() for address in addresses}
    assert caches.isdisjoint(address for address, *_ in cuda.calls("copy_to_host") + cuda.calls("copy_to_device"))
    assert sum(nbytes for _, nbytes in cuda.calls("copy_to_device")) == latents.nbytes


def test_a_graph_is_captured_once_for_each_set_of_addresses(chunked: Bundle, make: Make) -> None:
    cuda = FakeCuda()
    with make(chunked, cuda) as backend:
        for seed in range(3):
            decoded(backend, latents_for(chunked, CHUNKS, seed))
    captured = [names for _, *names in cuda.calls("capture")]
    assert captured == [["vae_decoder_next"], ["vae_decoder_next"], ["vae_decoder_first"]]
    assert len(cuda.calls("enqueue")) == 3, "each set of addresses runs once before it is captured"
    assert len(cuda.calls("launch")) == 3 * CHUNKS - 3
    cuda.assert_clean()


def test_the_next_chunk_is_queued_before_the_last_one_is_fetched(chunked: Bundle, make: Make) -> None:
    cuda = FakeCuda()
    with make(chunked, cuda, cuda_graphs=False) as backend:
        decoded(backend, latents_for(chunked, 3))
    order = [entry[0] for entry in cuda.log if entry[0] in ("enqueue", "copy_to_host")]
    assert order == ["enqueue", "enqueue", "copy_to_host", "enqueue", "copy_to_host", "copy_to_host"]


def test_a_capture_that_is_refused_is_noted_once_and_changes_nothing(
    mini: Bundle, make: Make, expected: NDArray[np.float32], tmp_path: Path
) -> None:
    cuda, progress = FakeCuda(), Notes()
    cuda.refuse_capture = True
    with make(mini, cuda, progress=progress) as backend:
        found = video(backend, tmp_path)
    assert np.array_equal(found, expected)
    assert len(progress.notes) == 1
    assert "cannot be captured" in progress.notes[0]
    cuda.assert_clean()


FACTS = {
    "text_encoder": {"weights": 90_000, "activations": 5_000},
    "modulation": {"weights": 30_000, "activations": 1_000},
    "transformer": {"weights": 80_000, "activations": 9_000},
    "vae_decoder_first": {"weights": 20_000, "activations": 40_000},
}


def bytes_of(bundle: Bundle, role: str, batch: int) -> int:
    """Return what a network takes within a run of the miniature."""
    network, side = bundle.network(role), bundle.shape.height // 8
    sizes = {"batch": batch, "latent_height": side, "latent_width": side}
    specs = (*network.inputs, *network.outputs)
    tensors = sum(int(np.prod(s.resolve(sizes))) * np.dtype(s.dtype).itemsize for s in specs)
    return FACTS[role]["weights"] + tensors


def test_everything_stays_loaded_and_shares_one_block_of_activations(
    mini: Bundle, make: Make, expected: NDArray[np.float32], tmp_path: Path
) -> None:
    cuda = FakeCuda()
    with make(mini, cuda, facts=FACTS) as backend:
        first, second = video(backend, tmp_path), video(backend, tmp_path)
        planned = sum(bytes_of(mini, role, 2 if role == "transformer" else 1) for role in FACTS) + 40_000
        assert cuda.peak == cuda.in_use == planned
    assert np.array_equal(first, expected)
    assert np.array_equal(second, expected)
    assert len([owner for *_, owner in cuda.calls("malloc") if owner.startswith("weights")]) == len(FACTS)
    cuda.assert_clean()


def test_within_a_limit_each_phase_makes_room_for_the_next(
    mini: Bundle, make: Make, expected: NDArray[np.float32], tmp_path: Path
) -> None:
    phases = [bytes_of(mini, role, 2 if role == "transformer" else 1) + FACTS[role]["activations"] for role in FACTS]
    cuda = FakeCuda()
    with make(mini, cuda, facts=FACTS, vram=max(phases)) as backend:
        found = [video(backend, tmp_path) for _ in range(2)]
    assert all(np.array_equal(each, expected) for each in found)
    assert cuda.peak == max(phases)
    loaded = [owner for *_, owner in cuda.calls("malloc") if owner.startswith("weights")]
    assert loaded == [f"weights of {role}" for role in FACTS] * 2
    cuda.assert_clean()


def test_weights_are_streamed_as_far_as_the_limit_asks(
    mini: Bundle, make: Make, expected: NDArray[np.float32], tmp_path: Path
) -> None:
    facts = FACTS | {"transformer": FACTS["transformer"] | {"streamable": 70_000, "scratch": 1_000}}
    facts["text_encoder"] = facts["text_encoder"] | {"streamable": 90_000}
    vram = bytes_of(mini, "vae_decoder_first", 1) + 40_000
    cuda = FakeCuda()
    with make(mini, cuda, facts=facts, vram=vram) as backend:
        found = video(backend, tmp_path)
    assert np.array_equal(found, expected)
    assert cuda.peak <= vram
    transformer = bytes_of(mini, "transformer", 2) + 10_000 - 70_000
    assert ("transformer", min(70_000, vram - transformer)) in cuda.calls("budget")
    cuda.assert_clean()


def test_without_a_limit_all_weights_lie_on_the_device(mini: Bundle, make: Make) -> None:
    cuda = FakeCuda()
    with make(mini, cuda, facts={"transformer": {"streamable": 3_000}}) as backend, backend.load(*TRANSFORMER):
        assert cuda.calls("budget") == [("transformer", 3_000)]
    cuda.assert_clean()


def test_a_limit_that_nothing_fits_in_says_what_would(mini: Bundle, make: Make) -> None:
    cuda = FakeCuda()
    needed = bytes_of(mini, "transformer", 1) + 9_000
    with make(mini, cuda, facts=FACTS, vram=needed - 1) as backend:
        with pytest.raises(OutOfMemoryError) as raised, backend.load(*TRANSFORMER):
            pass
        assert "weights 80.0kB, activations 9.0kB" in raised.value.what
        assert f"--vram {-(-needed // 100) / 10:.1f}kB or more" in raised.value.fix
        assert "--weight-streaming" in raised.value.fix
        assert cuda.in_use == 0
    cuda.assert_clean()


PHASES = ("text_encoder", "modulation", "transformer", "vae_decoder_first")


def phase_bytes(bundle: Bundle) -> list[int]:
    """Return what each network takes alone."""
    return [bytes_of(bundle, role, 2 if role == "transformer" else 1) + FACTS[role]["activations"] for role in PHASES]


@pytest.mark.parametrize("missing", [1, 60_000, 250_000])
def test_where_all_do_not_fit_the_phases_that_are_done_go_and_a_note_says_so(
    missing: int, mini: Bundle, make: Make, expected: NDArray[np.float32], tmp_path: Path
) -> None:
    planned = sum(bytes_of(mini, role, 2 if role == "transformer" else 1) for role in FACTS) + 40_000
    cuda, progress = FakeCuda(max(planned - missing, *phase_bytes(mini))), Notes()
    with make(mini, cuda, facts=FACTS, progress=progress) as backend:
        found = [video(backend, tmp_path) for _ in range(2)]
    assert all(np.array_equal(each, expected) for each in found)
    assert progress.notes
    assert all("did not fit beside" in note for note in progress.notes)
    cuda.assert_clean()


@pytest.mark.parametrize("missing", [1, 5_000, 30_000, 100_000, 200_000])
def test_out_of_memory_anywhere_is_stated_and_leaves_nothing(
    missing: int, mini: Bundle, make: Make, tmp_path: Path
) -> None:
    cuda = FakeCuda(max(phase_bytes(mini)) - missing)
    with (
        pytest.raises(OutOfMemoryError, match=r"does not fit into the GPU's memory.* are free") as raised,
        make(mini, cuda, facts=FACTS) as backend,
    ):
        video(backend, tmp_path)
    assert "end what else uses the GPU" in raised.value.fix
    cuda.assert_clean()


def test_what_an_out_of_memory_error_advises_helps(
    mini: Bundle, make: Make, expected: NDArray[np.float32], tmp_path: Path
) -> None:
    large = {"weights": 200_000, "activations": 9_000, "streamable": 190_000, "scratch": 1_000}
    facts = FACTS | {"transformer": large}
    cuda = FakeCuda(bytes_of(mini, "vae_decoder_first", 1) + 41_000)
    with (
        pytest.raises(OutOfMemoryError, match=r"does not fit") as raised,
        make(mini, cuda, facts=facts, vram=10**9) as backend,
    ):
        video(backend, tmp_path)
    advised = re.search(r"run with --vram ([\d.]+)kB", raised.value.fix)
    assert advised is not None
    with make(mini, cuda, facts=facts, vram=int(float(advised[1]) * 1000)) as backend:
        assert np.array_equal(video(backend, tmp_path), expected)
    cuda.assert_clean()


def test_kernels_that_were_compiled_are_kept_for_the_next_run(mini: Bundle, make: Make, tmp_path: Path) -> None:
    compiled = compiled_kernels()
    for _ in range(2):
        with make(mini, FakeCuda()) as backend, backend.load(*TRANSFORMER):
            pass
    assert compiled == ["transformer"]
    assert (tmp_path / "transformer.sm89.kernels").is_file()


def test_engines_are_found_in_the_bundles_store(mini: Bundle, tmp_path: Path) -> None:
    shutil.copytree(mini.path, tmp_path / "mini")
    bundle, cuda = Bundle.open(tmp_path / "mini"), FakeCuda()
    store, library = EngineStore(bundle), fake_library(cuda, networks_of(mini.path))
    network = bundle.network("transformer")
    weights = {name: bundle.manifest.weights[name].sha256 for name in network.weights}
    key = EngineKey(
        library.kind, network.file.sha256, weights, {"batch": (1, 2, 2)}, {}, library.version, ("sm86", "sm89")
    )
    store.folder.mkdir()
    engine = store.folder / "transformer.engine"
    EngineFacts("transformer", {}).write(engine)
    stat, relative = engine.stat(), str(engine.relative_to(bundle.path))
    file = StoredFile(relative, stat.st_size, sha256_of(engine))
    store.keep(EngineRecord(key, "transformer", file, stat.st_mtime_ns, file, "none", 1.0, 1, 1, "2026-01-01"))
    with TensorRtBackend(bundle, library, cuda, store) as backend:
        with backend.load(*TRANSFORMER) as session:
            session.run(transformer_inputs(bundle))
        with pytest.raises(EngineError, match="no tensorrt-rtx engine"), backend.load("text_encoder", {"batch": 1}):
            pass
    cuda.assert_clean()
    other = FakeCuda(gpu="sm120")
    with (
        TensorRtBackend(bundle, fake_library(other, networks_of(mini.path)), other, store) as backend,
        pytest.raises(EngineError, match="sm120"),
        backend.load(*TRANSFORMER),
    ):
        pass


def test_a_tensor_that_was_written_over_is_refused(mini: Bundle, make: Make) -> None:
    with make(mini, FakeCuda()) as backend, backend.load(*TRANSFORMER) as session:
        stale = session.run(transformer_inputs(mini))["noise_pred"]
        session.run(transformer_inputs(mini, 1))
        with pytest.raises(EngineError, match="after another run wrote over it"):
            backend.to_host(stale)


def test_inputs_that_do_not_fit_are_refused(mini: Bundle, make: Make) -> None:
    inputs = transformer_inputs(mini)
    with make(mini, FakeCuda()) as backend, backend.load(*TRANSFORMER) as session:
        with pytest.raises(EngineError, match="takes modulation as float32"):
            session.run(inputs | {"modulation": inputs["modulation"].astype(np.float16)})
        with pytest.raises(EngineError, match="takes hidden_states as"):
            session.run(inputs | {"hidden_states": inputs["hidden_states"][:, :1]})
        with pytest.raises(EngineError, match="and is given modulation"):
            session.run({"modulation": inputs["modulation"]})


def test_a_network_is_not_run_after_its_block(mini: Bundle, make: Make) -> None:
    with make(mini, FakeCuda()) as backend:
        with backend.load(*TRANSFORMER) as session:
            pass
        with pytest.raises(EngineError, match="after it was let go of"):
            session.run(transformer_inputs(mini))


@pytest.mark.parametrize("damage", [b"", b"not an engine" * 99, b'{"role": "text_encoder", "sizes": {}}'.ljust(4512)])
def test_a_damaged_or_foreign_engine_is_stated(damage: bytes, mini: Bundle, make: Make, tmp_path: Path) -> None:
    cuda = FakeCuda()
    (tmp_path / "transformer.engine").write_bytes(damage)
    with (
        pytest.raises(EngineError, match=r"cannot load transformer|none of this bundle"),
        make(mini, cuda) as backend,
        backend.load(*TRANSFORMER),
    ):
        pass
    cuda.assert_clean()


# Twins: the fake finds each way a backend could be wrong.


def test_twin_work_that_is_not_waited_for_is_found(
    mini: Bundle, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda = FakeCuda()
    monkeypatch.setattr(cuda, "synchronize", lambda stream: None)
    with pytest.raises(MisuseError, match="work queued"), make(mini, cuda) as backend, backend.load(*TRANSFORMER) as s:
        s.run(transformer_inputs(mini))


def test_twin_memory_freed_too_early_is_found(mini: Bundle, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda()
    with make(mini, cuda, vram=2**30) as backend:
        with backend.load(*TRANSFORMER) as session:
            session.run(transformer_inputs(mini))
        with monkeypatch.context() as patch:
            patch.setattr(cuda, "synchronize", lambda stream: None)
            with backend.load("text_encoder", {"batch": 1}):  # the transformer makes room for it
                pass
        with pytest.raises(MisuseError, match="uses memory after it was freed"):
            cuda.synchronize(backend._stream)
        cuda.abandon()


def test_twin_a_leak_is_found(mini: Bundle, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda()
    with make(mini, cuda) as backend, backend.load(*TRANSFORMER):
        monkeypatch.setattr(DeviceMemory, "free", lambda memory, buffer: None)
    with pytest.raises(MisuseError, match=r"left behind: \{'device memory'"):
        cuda.assert_clean()


def test_twin_a_forgotten_binding_is_found(mini: Bundle, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    launch = Launcher.run
    monkeypatch.setattr(Launcher, "run", lambda self, places: launch(self, dict(list(places.items())[1:])))
    with (
        make(mini, FakeCuda()) as backend,
        backend.load(*TRANSFORMER) as session,
        pytest.raises(EngineError, match="the address of 'hidden_states' is not set"),
    ):
        session.run(transformer_inputs(mini))


def test_twin_pinned_memory_that_is_written_too_early_is_found(
    chunked: Bundle,
    make: Make,
    expected_pixels: Callable[[vae.Clip], NDArray[np.float32]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cuda, latents = FakeCuda(), latents_for(chunked, CHUNKS)
    monkeypatch.setattr(cuda, "synchronize_event", lambda event: None)
    with make(chunked, cuda) as backend:
        assert not np.array_equal(decoded(backend, latents), expected_pixels(latents))


def test_twin_a_graph_whose_memory_moved_is_found(
    mini: Bundle, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TrtSession, "forget_graphs", lambda session: None)
    cuda = FakeCuda()
    with make(mini, cuda, facts=FACTS) as backend:
        video(backend, tmp_path)
        with pytest.raises(MisuseError, match="launched whose memory is gone"):
            video(backend, tmp_path)


def test_twin_a_constant_taken_for_another_is_found(
    mini: Bundle, make: Make, expected: NDArray[np.float32], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = Upload.put

    def once(upload: Upload, values: Any, stream: int) -> None:
        if upload._held is None:
            put(upload, values, stream)

    monkeypatch.setattr(Upload, "put", once)
    with make(mini, FakeCuda()) as backend:
        video(backend, tmp_path, prompts=("a blue square",))
        assert not np.array_equal(video(backend, tmp_path), expected)
