"""The TensorRT backend on a driver, without TensorRT: a library of the same calls, whose contexts queue CuPy's kernels.

What is put to the test is all that stands between the sampler and TensorRT: buffers, copies, the caches that pass from
run to run, streams, events and CUDA graphs. What a network computes is made up: element i of each output is the sum of
its inputs' elements i (modulo their number), the k-th times 2^-k, which is the same to the bit in NumPy.
"""

import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from cvx_deploy.bundle.opened import Bundle
from cvx_deploy.bundle.schema import Network, TensorSpec
from cvx_deploy.engines.cuda import Cuda
from cvx_deploy.engines.tensorrt.backend import TensorRtBackend
from cvx_deploy.engines.tensorrt.libraries import Library
from cvx_deploy.miniatures import miniature
from cvx_deploy.progress import SilentProgress

Array = NDArray[np.float32]
Place = tuple[int, int]
"""Where values of float32 lie on the device, and how many there are."""
RUNS, CHUNKS = 20, 6
_BLOCK = 256
_SOURCE = """
extern "C" __global__ void mix(const float* in, long long n, float* out, long long size, float weight, int first) {
    long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x;
    if (i < size) out[i] = (first ? 0.0f : out[i]) + in[i % n] * weight;
}
"""


class Kernels(Protocol):
    """What queues the kernels."""

    def mix(self, stream: int, inputs: list[Place], output: Place) -> None:
        """Queue what makes one output of all inputs."""


class CupyKernels:
    """Those of a GPU."""

    def __init__(self) -> None:
        import cupy

        self._cupy, self._kernel = cupy, cupy.RawKernel(_SOURCE, "mix")

    def mix(self, stream: int, inputs: list[Place], output: Place) -> None:
        """See `Kernels`."""
        address, size = output
        with self._cupy.cuda.ExternalStream(stream):
            for number, (given, count) in enumerate(inputs):
                words = (np.intp(given), np.int64(count), np.intp(address), np.int64(size))
                blocks = (size + _BLOCK - 1) // _BLOCK
                self._kernel((blocks,), (_BLOCK,), (*words, np.float32(2.0**-number), np.int32(number == 0)))


def mixed(inputs: list[Array], shape: tuple[int, ...]) -> Array:
    """Return what a network puts out, computed on the host."""
    places, found = np.arange(int(np.prod(shape))), np.zeros(int(np.prod(shape)), np.float32)
    for number, array in enumerate(inputs):
        found += array.ravel()[places % array.size] * np.float32(2.0**-number)
    return found.reshape(shape)


@dataclass
class _Engine:
    """What `Engine` asks of an ``ICudaEngine``; it has no weights."""

    network: Network
    kernels: Kernels
    streamable_weights_size: int = 0
    device_memory_size_v2: int = 4096

    @property
    def _specs(self) -> tuple[TensorSpec, ...]:
        return (*self.network.inputs, *self.network.outputs)

    @property
    def num_io_tensors(self) -> int:
        return len(self._specs)

    def get_engine_stat(self, _: Any) -> int:
        return 0

    def get_tensor_name(self, index: int) -> str:
        return self._specs[index].name

    def get_tensor_dtype(self, _: str) -> Any:
        return np.dtype(np.float32)

    def create_execution_context(self, _: Any) -> "_Context":
        return _Context(self.network, self.kernels)


class _Context:
    def __init__(self, network: Network, kernels: Kernels) -> None:
        self._network, self._kernels = network, kernels
        self._addresses: dict[str, int] = {}
        self._shapes = {spec.name: spec.resolve({}) for spec in (*network.inputs, *network.outputs)}

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        return self._shapes[name] == tuple(shape)

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._addresses[name] = address
        return True

    def set_device_memory(self, address: int, nbytes: int) -> None:
        """It computes in none."""

    def execute_async_v3(self, stream: int) -> bool:
        inputs = [self._place(spec.name) for spec in self._network.inputs]
        for spec in self._network.outputs:
            self._kernels.mix(stream, inputs, self._place(spec.name))
        return True

    def _place(self, name: str) -> Place:
        return self._addresses[name], int(np.prod(self._shapes[name]))


class _Files:
    """A store whose engine files say which network they are."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def find(self, kind: str, role: str, *_: Any) -> str:
        return role

    def path(self, role: str) -> Path:
        path = self._folder / f"{role}.engine"
        path.write_text(role)
        return path


def library(bundle: Bundle, kernels: Kernels) -> Library:
    """Return a library whose engines queue such kernels."""
    module: Any = ModuleType("made_up_tensorrt")
    module.ILogger = type("ILogger", (), {"ERROR": 1, "INTERNAL_ERROR": 0, "__init__": lambda _: None})
    module.IStreamReaderV2 = type("IStreamReaderV2", (), {"__init__": lambda _: None})
    module.SeekPosition = SimpleNamespace(SET=0, CUR=1, END=2)
    module.ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED=2)
    module.EngineStat = SimpleNamespace(TOTAL_WEIGHTS_SIZE=0)
    module.Runtime = lambda _: SimpleNamespace(
        deserialize_cuda_engine=lambda reader: _Engine(bundle.network(reader.read(100, 0).decode()), kernels)
    )
    return Library("tensorrt", module, "10.14")


def made_up_bundle(scale: int) -> Bundle:
    """Return a bundle of made-up networks: a transformer, and a decoder that hands a cache on; `scale`d."""
    mini = Bundle.open(miniature("mini"))
    of = mini.network("transformer")

    def spec(name: str, *shape: int) -> TensorSpec:
        return TensorSpec(name, "float32", shape, "BCHW"[: len(shape)])

    hidden = spec("hidden", 1, 16, 64 * scale)
    latents, frames = spec("latents", 1, 16, 64 * scale), spec("frames", 1, 3, 512 * scale)
    cache, kept = spec("cache", 1, 8, 256 * scale), spec("kept", 1, 8, 256 * scale)
    state = {"cache": "kept"}
    networks = {
        "transformer": replace(of, inputs=(hidden, spec("text", 1, 226, 64)), outputs=(replace(hidden, name="noise"),)),
        "vae_decoder_first": replace(of, inputs=(latents,), outputs=(frames, kept), state=state),
        "vae_decoder_next": replace(of, inputs=(latents, cache), outputs=(frames, kept), state=state),
    }
    entry = replace(mini.manifest.shapes[0], networks={name: name for name in networks})
    return replace(mini, manifest=replace(mini.manifest, networks=networks, shapes=(entry,)))


def backend_runs(cuda: Cuda, kernels: Kernels, scale: int) -> dict[str, Any]:
    """Run a transformer's steps and a decoder's chunks with graphs and without; return what was right, and how long."""
    bundle, found = made_up_bundle(scale), dict[str, Any]()
    with tempfile.TemporaryDirectory() as folder:
        for graphs in (False, True):
            notes = _Notes()
            store: Any = _Files(Path(folder))
            made = library(bundle, kernels)
            with TensorRtBackend(bundle, made, cuda, store, cuda_graphs=graphs, progress=notes) as backend:
                steps, seconds = _steps(backend)
                chunks = _chunks(backend)
            name = "with graphs" if graphs else "kernel by kernel"
            found[name] = {
                "steps_right": steps,
                "chunks_right": chunks,
                "seconds_a_step": seconds,
                "refused": notes.kept,
            }
    wrong = [name for name, one in found.items() if not (one["steps_right"] and one["chunks_right"])]
    if wrong:
        raise ValueError(f"other values than on the host: {', '.join(wrong)}")
    return found


class _Notes(SilentProgress):
    def __init__(self) -> None:
        self.kept: list[str] = []

    def note(self, text: str) -> None:
        """Keep it."""
        self.kept.append(text)


def _inputs(network: Network, seed: int) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    return {spec.name: rng.standard_normal(spec.resolve({}), np.float32) for spec in network.inputs}


def _steps(backend: TensorRtBackend) -> tuple[bool, float]:
    """Run the transformer on other latents each time; return whether all was right, and seconds a run."""
    network, right, taken = backend.bundle.network("transformer"), True, []
    text = _inputs(network, 0)["text"]
    with backend.load("transformer", {}) as session:
        held = backend.to_device(text)
        for step in range(RUNS):
            hidden = _inputs(network, step)["hidden"]
            start = time.perf_counter()
            noise = backend.to_host(session.run({"hidden": hidden, "text": held})["noise"])
            taken.append(time.perf_counter() - start)
            right &= np.array_equal(noise, mixed([hidden, text], noise.shape))
    return right, float(np.median(taken))


def _chunks(backend: TensorRtBackend) -> bool:
    """Decode chunks, each fetched after the next one is queued; return whether frames and caches were right."""
    first, following = (backend.bundle.network(f"vae_decoder_{which}") for which in ("first", "next"))
    right, cache = True, np.empty(0, np.float32)
    waiting: list[tuple[Any, Array]] = []
    outputs: Mapping[str, Any] = {}
    for chunk in range(CHUNKS):
        network, role = (following, "vae_decoder_next") if chunk else (first, "vae_decoder_first")
        latents = _inputs(network, 100 + chunk)["latents"]
        shapes = {spec.name: spec.resolve({}) for spec in network.outputs}
        given = [latents, cache] if chunk else [latents]
        with backend.load(role, {}) as session:
            outputs = session.run({"latents": latents} | ({"cache": outputs["kept"]} if chunk else {}))
        waiting.append((outputs["frames"], mixed(given, shapes["frames"])))
        cache = mixed(given, shapes["kept"])
        if len(waiting) > 1:
            tensor, expected = waiting.pop(0)
            right &= np.array_equal(backend.to_host(tensor), expected)
    [(tensor, expected)] = waiting
    return right and np.array_equal(backend.to_host(tensor), expected)
