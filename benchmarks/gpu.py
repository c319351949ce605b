"""All that is to be seen on an NVIDIA GPU, in fifteen minutes: one command, which goes on where it stopped.

    python benchmarks/gpu.py --output DIR --bundle DIR [--parts driver ...] [--rehearse --runtime DIR]

Each part runs in a process of its own within its time, and writes ``DIR/PART.json`` when it ends; one that is done is
not run again. The order is that of worth, and the plan is, from the minute the machine is there:

    0:00  facts        what the machine is; the rate of its bf16 products and copies, measured with torch
    0:45  driver       the seam to CUDA: copies, two threads, out of memory, graphs, captures that are refused
    1:30  backend      the TensorRT backend on that driver, with contexts that queue CuPy's kernels; graphs on and off
    2:15  miniature    a video of the miniature on ONNX Runtime CUDA, against the same on the CPU
    3:30  transformer  of the bundle, as it is loaded for CUDA and as it was exported: seconds, TFLOP/s and memory
    6:45  decoder      the VAE's chunks
    8:30  text         the text encoder
    9:30  attention    PyTorch's attention at the transformer's size: flash, cuDNN, memory-efficient
    10:45 eager        diffusers' own transformer in PyTorch, where diffusers was brought along: plain, compiled, and in
                       fp8 where torchao was, too
    14:00 end

The bundle's weights need not be there: files of random bfloat16 numbers stand in for those that are missing.
`benchmarks/gpu_pack.py` packs what has to be brought. `--rehearse` goes through all of it without a GPU: a driver of
the tests, with `--runtime` ONNX Runtime's own CUDA provider on stand-ins (see `benchmarks/cuda_placement.py`), and
PyTorch on the CPU at a tiny size; it shows that every part runs to its end, and its figures mean nothing. A rate is
told beside its share of what ``facts`` measured.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import gpu_eager
import numpy as np
from gpu_flops import flops, rate
from numpy.typing import NDArray

from cvx_deploy.bundle.opened import Bundle
from cvx_deploy.bundle.schema import numpy_dtype
from cvx_deploy.engines.cuda import Cuda, CudaPython
from cvx_deploy.errors import EngineError, OutOfMemoryError
from cvx_deploy.measure.conditions import conditions

TOOLS = ("onnxruntime-gpu", "torch", "diffusers", "cuda-python", "numpy")
LIMITS = {
    "facts": 45,
    "driver": 45,
    "backend": 45,
    "miniature": 75,
    "transformer": 195,
    "decoder": 105,
    "text": 60,
    "attention": 75,
    "eager": 195,
}
"""Seconds of each part, in the order in which they run."""
ROLES = {
    "transformer": ("transformer",),
    "decoder": ("vae_decoder_first", "vae_decoder_next"),
    "text": ("text_encoder",),
}
RUNS = 3
_KERNEL = re.compile(r"SdpaKernel=(\w+)")
"""What ONNX Runtime says of each attention it runs."""


def facts(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what the machine is, and how fast PyTorch multiplies and copies on it."""
    told = conditions(TOOLS, "benchmarks/gpu.py")
    if arguments.rehearse:
        return told
    import torch

    device = torch.cuda.get_device_properties(0)
    x = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    product = gpu_eager.seconds_of(lambda: x @ x, "cuda")
    copy = gpu_eager.seconds_of(lambda: x.clone(), "cuda")
    return told | {
        "gpu": device.name,
        "capability": f"sm{device.major}{device.minor}",
        "memory": device.total_memory,
        "bf16_tflops": 2 * 8192**3 / product / 1e12,
        "copy_gb_a_second": 2 * x.nbytes / copy / 1e9,
    }


def driver(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what the seam to CUDA did, call by call; a check that fails is a finding, and the others go on."""
    cuda: Cuda = CudaPython() if not arguments.rehearse else _rehearsed_driver()
    found: dict[str, Any] = {"gpu": str(cuda.gpu(0)), "count": cuda.count()}
    for check in (_copies, _two_threads, _out_of_memory, _graph, _refused_capture, _addresses):
        try:
            found[check.__name__.strip("_")] = check(cuda)
        except Exception as error:
            found[check.__name__.strip("_")] = f"FAILED: {type(error).__name__}: {error}"
    return found


def _rehearsed_driver() -> Any:
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from tests.engines.fake_cuda import FakeCuda

    return FakeCuda(2**30)


def backend(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run the TensorRT backend with contexts that queue kernels of CuPy, as graphs and one by one."""
    import gpu_backend

    if not arguments.rehearse:
        return gpu_backend.backend_runs(CudaPython(), gpu_backend.CupyKernels(), 4096)
    cuda = _rehearsed_driver()
    found = gpu_backend.backend_runs(cuda, _RehearsedKernels(cuda), 4)
    cuda.assert_clean()
    return found


class _RehearsedKernels:
    """Kernels of the tests' driver, which NumPy computes when it comes to them."""

    def __init__(self, cuda: Any) -> None:
        self._cuda = cuda

    def mix(self, stream: int, inputs: list[tuple[int, int]], output: tuple[int, int]) -> None:
        from gpu_backend import mixed

        from tests.engines.fake_cuda import Operation

        given = [self._cuda.region(address, 4 * count) for address, count in inputs]
        written = self._cuda.region(output[0], 4 * output[1])

        def work() -> None:
            values = [np.frombuffer(region.read(), np.float32) for region in given]
            written.write(mixed(values, (output[1],)).tobytes())

        needs = tuple(region.allocation for region in (*given, written))
        self._cuda.kernel(stream, Operation("mix", work, needs))


def _round_trip(cuda: Cuda, nbytes: int, seed: int) -> str:
    import ctypes

    cuda.use(0)
    stream, memory = cuda.create_stream(), cuda.malloc(nbytes)
    hosts = [cuda.malloc_host(nbytes) for _ in range(2)]
    views = [np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(host)) for host in hosts]
    views[0][...] = np.random.default_rng(seed).integers(0, 256, nbytes, np.uint8)
    start = time.perf_counter()
    cuda.copy_to_device(memory, hosts[0], nbytes, stream)
    cuda.copy_to_host(hosts[1], memory, nbytes, stream)
    cuda.synchronize(stream)
    seconds = time.perf_counter() - start
    same = np.array_equal(views[0], views[1])
    cuda.free(memory)
    cuda.destroy_stream(stream)
    for host in hosts:
        cuda.free_host(host)
    if not same:
        raise ValueError("bytes changed on their way")
    return f"{2 * nbytes / seconds / 1e9:.1f} GB/s"


def _copies(cuda: Cuda) -> str:
    return _round_trip(cuda, 64 << 20, 0)


def _two_threads(cuda: Cuda) -> str:
    failed: list[str] = []

    def work(seed: int) -> None:
        try:
            for turn in range(4):
                _round_trip(cuda, 1 << 20, seed + turn)
        except Exception as error:
            failed.append(str(error))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in (1, 100)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise ValueError(failed[0])
    return "both right"


def _out_of_memory(cuda: Cuda) -> str:
    _, total = cuda.memory_info()
    try:
        cuda.malloc(2 * total)
    except OutOfMemoryError as error:
        cuda.free(cuda.malloc(1 << 20))
        return f"stated, and what fits is given afterwards: {error}"
    raise ValueError("twice the memory there is was given")


def _graph(cuda: Cuda) -> str:
    """Capture a copy, and launch it twice with other bytes."""
    import ctypes

    stream, memory, host = cuda.create_stream(), cuda.malloc(256), cuda.malloc_host(256)
    back = cuda.malloc_host(256)
    cuda.begin_capture(stream)
    cuda.copy_to_device(memory, host, 256, stream)
    cuda.copy_to_host(back, memory, 256, stream)
    graph = cuda.end_capture(stream)
    views = [np.ctypeslib.as_array((ctypes.c_uint8 * 256).from_address(place)) for place in (host, back)]
    right = []
    for value in (3, 7):
        views[0][...] = value
        cuda.launch(graph, stream)
        cuda.synchronize(stream)
        right.append(bool((views[1] == value).all()))
    cuda.destroy_graph(graph)
    cuda.destroy_stream(stream)
    cuda.free(memory)
    for place in (host, back):
        cuda.free_host(place)
    if not all(right):
        raise ValueError("the graph copied something else")
    return "launched twice, right twice"


def _refused_capture(cuda: Cuda) -> dict[str, str]:
    """Try what a capture forbids, and whether the stream works afterwards."""
    forbidden: dict[str, Callable[[], Any]] = {
        "malloc": lambda: cuda.free(cuda.malloc(256)),
        "malloc_host": lambda: cuda.free_host(cuda.malloc_host(256)),
    }
    found = {}
    for name, call in forbidden.items():
        stream = cuda.create_stream()
        cuda.begin_capture(stream)
        try:
            call()
            found[name] = "allowed"
        except (EngineError, AssertionError) as error:
            found[name] = f"refused: {error}"
        try:
            cuda.destroy_graph(cuda.end_capture(stream))
            found[name] += "; the capture stands"
        except EngineError as error:
            found[name] += f"; the capture is lost: {error}"
        cuda.synchronize(stream)
        cuda.destroy_stream(stream)
    return found


def _addresses(cuda: Cuda) -> str:
    """Make sure that addresses are aligned as the backend takes for granted."""
    addresses = [cuda.malloc(size) for size in (1, 100, 1000)]
    for address in addresses:
        cuda.free(address)
    if any(address % 256 for address in addresses):
        raise ValueError("memory is not aligned to 256 bytes")
    return "aligned to 256 bytes"


def miniature_video(arguments: argparse.Namespace) -> dict[str, Any]:
    """Make a video of the miniature on the GPU and on the CPU; return how far apart they are."""
    from cvx_deploy.engines.registry import open_backend
    from cvx_deploy.miniatures import miniature
    from cvx_deploy.pipeline.request import RunRequest
    from cvx_deploy.pipeline.run import run

    bundle, videos = Bundle.open(miniature("mini")), {}
    engines = ("onnxruntime",) if arguments.rehearse else ("onnxruntime", "onnxruntime-cuda")
    for engine in engines:
        place = arguments.output / f"miniature-{engine}.npy"
        with open_backend(engine, bundle) as backend:
            start = time.perf_counter()
            run(backend, RunRequest(("a red circle moves to the right",), place, steps=10))
            videos[engine] = (time.perf_counter() - start, np.load(place))
    first = videos["onnxruntime"][1]
    return {
        engine: {"seconds": seconds, "largest_difference": float(np.abs(frames - first).max())}
        for engine, (seconds, frames) in videos.items()
    }


def networks(arguments: argparse.Namespace) -> dict[str, Any]:
    """Load and run the networks of a part, as CUDA is given them and as they were exported."""
    import cuda_placement

    bundle, found = Bundle.open(arguments.bundle), dict[str, Any]()
    make_weights(bundle)
    if arguments.rehearse and arguments.runtime is None:
        return {"left out": "a rehearsal of it needs --runtime"}
    for role in ROLES[arguments.part]:
        if role not in bundle.manifest.shapes[0].networks:
            continue
        for form in ("loaded", "exported"):
            with cuda_placement.patch_loading() if form == "exported" else nullcontext():
                try:
                    one = timed(bundle, role, blank=arguments.rehearse)
                    seconds = float(np.median(one["seconds"][1:]))
                    operations = flops(
                        cuda_placement.inferred(bundle.onnx_bytes(role), cuda_placement.sizes_of(bundle, role))
                    )
                    found[f"{role}, as {form}"] = one | rate(operations, seconds, arguments.output)
                except EngineError as error:
                    found[f"{role}, as {form}"] = {"failed": str(error)}
    return found


def timed(bundle: Bundle, role: str, *, blank: bool) -> dict[str, Any]:
    """Load a network and run it a few times; return seconds, memory, and what runs where."""
    import cuda_placement

    from cvx_deploy.engines.onnxruntime.backend import OrtBackend

    sizes = cuda_placement.sizes_of(bundle, role)
    seen = cuda_placement.without_convolutions(bundle, sizes) if blank else bundle
    rng, specs = np.random.default_rng(0), bundle.network(role).inputs
    inputs = {spec.name: _made(rng, spec.resolve(sizes), numpy_dtype(spec.dtype)) for spec in specs}
    backend, before, start = OrtBackend(seen, device=0), cuda_placement.used(), time.perf_counter()
    with backend.load(role, sizes) as session:
        found: dict[str, Any] = {"load_seconds": time.perf_counter() - start, "seconds": []}
        found |= {"loaded_bytes": cuda_placement.used() - before}
        given = {name: backend.to_device(array) for name, array in inputs.items()}
        output = bundle.network(role).outputs[0].name
        for _ in range(RUNS + 1):  # the first sets up cuBLAS and cuDNN
            start = time.perf_counter()
            result = backend.to_host(session.run(given)[output])
            found["seconds"].append(time.perf_counter() - start)
        found["after_runs_bytes"] = cuda_placement.used() - before
        found["finite"] = bool(np.isfinite(result).all())
    return found


def _made(rng: np.random.Generator, shape: tuple[int, ...], dtype: "np.dtype[Any]") -> NDArray[Any]:
    return rng.integers(0, 200, shape) if dtype.kind == "i" else rng.standard_normal(shape, np.float32).astype(dtype)


def make_weights(bundle: Bundle) -> None:
    """Write random bfloat16 numbers where weight files are missing, of the time and size that the manifest knows."""
    block = (np.random.default_rng(0).standard_normal(8 << 20, np.float32) / 50).view(np.uint32) >> 16
    numbers = block.astype(np.uint16).tobytes()
    for entry in bundle.manifest.weights.values():
        path = Path(bundle.path if entry.in_bundle else bundle.manifest.checkpoint) / entry.path
        if path.exists():
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            for start in range(0, entry.size, len(numbers)):
                file.write(numbers[: min(len(numbers), entry.size - start)])
        os.utime(path, ns=(entry.mtime_ns, entry.mtime_ns))


PARTS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "facts": facts,
    "driver": driver,
    "backend": backend,
    "miniature": miniature_video,
    "transformer": networks,
    "decoder": networks,
    "text": networks,
    "attention": gpu_eager.attention,
    "eager": gpu_eager.eager,
}


def run_parts(arguments: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    """Run what is not done yet, each in a process of its own and within its time; yield how each ended."""
    end = time.monotonic() + 60 * arguments.minutes
    for part in arguments.parts:
        place = arguments.output / f"{part}.json"
        if place.exists() and json.loads(place.read_text())["ended"] == "done":
            continue
        left = end - time.monotonic()
        if left < 20:
            yield part, {"ended": "left out: no time"}
            continue
        yield part, _one(part, min(LIMITS[part], left), arguments, place)


def _one(part: str, limit: float, arguments: argparse.Namespace, place: Path) -> dict[str, Any]:
    command = [sys.executable, __file__, "--part", part, "--output", arguments.output, "--bundle", arguments.bundle]
    command += ["--rehearse"] if arguments.rehearse else []
    environment = dict(os.environ)
    if arguments.runtime is not None:
        command += ["--runtime", arguments.runtime]
        environment["PYTHONPATH"] = f"{arguments.runtime / 'site'}{os.pathsep}{Path(__file__).parents[1]}"
        environment["LD_LIBRARY_PATH"] = str(arguments.runtime / "lib")
    environment["ORT_ENABLE_ATTENTION_KERNEL_DEBUG_INFO"] = "1"
    start, found = time.monotonic(), dict[str, Any]()
    try:
        done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, timeout=limit)
        last = (done.stderr.strip().splitlines() or ["it ended without a word"])[-1]
        ended = "done" if done.returncode == 0 else f"failed: {last}"
        found = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {}
        if kernels := Counter(_KERNEL.findall(done.stdout + done.stderr)):
            found["attention_kernels"] = dict(kernels)
    except subprocess.TimeoutExpired:
        ended = f"stopped after {limit:.0f} s"
    result = {"ended": ended, "seconds": round(time.monotonic() - start, 1), "rehearsed": arguments.rehearse, **found}
    place.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


def main() -> None:
    """Read the command line and run the parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="a folder for the parts' results")
    parser.add_argument("--bundle", type=Path, required=True, help="whose networks are run; its weights may be missing")
    parser.add_argument("--parts", nargs="+", choices=list(LIMITS), default=list(LIMITS))
    parser.add_argument("--minutes", type=float, default=14, help="for all of it")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU")
    parser.add_argument("--runtime", type=Path, help="a folder with site and lib; see cuda_placement.py")
    parser.add_argument("--part", choices=list(LIMITS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    if arguments.part:
        print(json.dumps(PARTS[arguments.part](arguments)))
        return
    for part, result in run_parts(arguments):
        print(f"{part:12} {result['ended']}, {result.get('seconds', 0)} s", file=sys.stderr)


if __name__ == "__main__":
    main()
