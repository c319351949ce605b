"""The thin seam to the CUDA driver: the calls that a backend makes, and every error of theirs in words.

Addresses, streams, events and graphs are plain integers here. `CudaPython` is the real driver; the tests have one that
keeps its memory in NumPy arrays and finds leaks.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

from cvx_deploy.errors import EngineError, OutOfMemoryError
from cvx_deploy.install import pip_install

_INSTALL = pip_install("tensorrt")


class NoGpuError(EngineError):
    """This machine has no GPU that a driver shows: nothing is broken, there is none."""


@dataclass(frozen=True)
class Gpu:
    """What the driver says of one device.

    Attributes:
        compute_capability: Such as ``sm89``.
        memory: Bytes.
        driver: The driver's version, such as ``580.65.06``; ``unknown`` where nothing here can ask NVML for it.
    """

    name: str
    compute_capability: str
    memory: int
    driver: str


class Cuda(Protocol):
    """The driver, as a backend needs it; every call raises EngineError when it fails.

    What is queued on a stream runs in that stream's order, some time after the call returns.
    """

    def count(self) -> int:
        """Return how many devices there are."""

    def gpu(self, device: int) -> Gpu:
        """Describe a device."""

    def use(self, device: int) -> None:
        """Make a device the current one of this thread."""

    def memory_info(self) -> tuple[int, int]:
        """Return the free bytes of the current device, and all of them."""

    def malloc(self, nbytes: int) -> int:
        """Allocate device memory, aligned to 256 bytes; OutOfMemoryError when there is not enough."""

    def free(self, address: int) -> None:
        """Free device memory; nothing that is queued may still need it."""

    def malloc_host(self, nbytes: int) -> int:
        """Allocate pinned host memory, which asynchronous copies go through."""

    def free_host(self, address: int) -> None:
        """Free pinned host memory; nothing that is queued may still need it."""

    def copy_to_device(self, device: int, host: int, nbytes: int, stream: int) -> None:
        """Queue a copy of pinned memory at `host` to the address `device`."""

    def copy_to_host(self, host: int, device: int, nbytes: int, stream: int) -> None:
        """Queue a copy of device memory to pinned memory at `host`."""

    def create_stream(self) -> int:
        """Return a new stream, which waits for no other."""

    def destroy_stream(self, stream: int) -> None:
        """Let go of a stream."""

    def synchronize(self, stream: int) -> None:
        """Wait until all that is queued on a stream is done."""

    def create_event(self) -> int:
        """Return a new event; one that was never recorded counts as reached."""

    def destroy_event(self, event: int) -> None:
        """Let go of an event."""

    def record(self, event: int, stream: int) -> None:
        """Put an event behind all that is queued on a stream now."""

    def wait(self, stream: int, event: int) -> None:
        """Let a stream wait, before what is queued on it next, until an event is reached."""

    def synchronize_event(self, event: int) -> None:
        """Wait until an event is reached."""

    def begin_capture(self, stream: int) -> None:
        """Record what this thread queues on a stream from here on, rather than run it."""

    def end_capture(self, stream: int) -> int:
        """Return what was recorded, as a graph that can be launched; EngineError when it cannot be one."""

    def launch(self, graph: int, stream: int) -> None:
        """Queue a graph on a stream."""

    def destroy_graph(self, graph: int) -> None:
        """Let go of a graph that is not running."""


class CudaPython:
    """The driver of this machine, through ``cuda-python``.

    Raises:
        EngineError: The package, the driver or a device is missing, or the driver is too old.
    """

    def __init__(self) -> None:
        try:
            from cuda.bindings import runtime
        except ImportError as error:
            raise EngineError(f"CUDA needs the package cuda-python ({error})", fix=_INSTALL) from error
        self._runtime: Any = runtime
        self._check_driver()

    def _check_driver(self) -> None:
        driver, runtime = (
            self._call(call) for call in (self._runtime.cudaDriverGetVersion, self._runtime.cudaRuntimeGetVersion)
        )
        if driver == 0:
            raise NoGpuError(
                "this machine has no NVIDIA driver",
                fix="install one on a machine with an NVIDIA GPU, or run with --engine onnxruntime",
            )
        if driver // 1000 < runtime // 1000:
            raise EngineError(
                f"the NVIDIA driver is too old: it does CUDA {_version(driver)}, and this needs {runtime // 1000}.0",
                fix=f"update the driver, or pip install cuda-python=={driver // 1000}.*",
            )
        self.count()

    def _call(self, function: Any, *arguments: Any) -> Any:
        """Call the runtime and return what follows the error code: nothing, or one value."""
        error, *values = function(*arguments)
        if int(error) != 0:
            raise self._stated(error, function.__name__)
        return values[0] if values else None

    def _stated(self, error: Any, call: str) -> EngineError:
        name = error.name
        self._runtime.cudaGetLastError()  # so that no later call is taken to have failed with it
        if name == "cudaErrorMemoryAllocation":
            return OutOfMemoryError("the device is out of memory", fix="end what else uses it, or run with --vram")
        if name in _STATED:
            return _STATED[name]()
        text = self._runtime.cudaGetErrorString(error)[1]
        words = text.decode() if isinstance(text, bytes) else text
        return EngineError(f"CUDA failed in {call}: {words} ({name})", fix="see what nvidia-smi says, and report this")

    def count(self) -> int:
        """See `Cuda.count`."""
        return int(self._call(self._runtime.cudaGetDeviceCount))

    def gpu(self, device: int) -> Gpu:
        """See `Cuda.gpu`."""
        self._check_device(device)
        found = self._call(self._runtime.cudaGetDeviceProperties, device)
        name = found.name.decode() if isinstance(found.name, bytes) else found.name
        return Gpu(name, f"sm{found.major}{found.minor}", int(found.totalGlobalMem), _driver_version())

    def _check_device(self, device: int) -> None:
        count = self.count()
        if not 0 <= device < count:
            raise EngineError(
                f"there is no GPU {device}: this machine shows {count}", fix=f"use devices 0 to {count - 1}"
            )

    def use(self, device: int) -> None:
        """See `Cuda.use`."""
        self._call(self._runtime.cudaSetDevice, device)

    def memory_info(self) -> tuple[int, int]:
        """See `Cuda.memory_info`."""
        error, free, total = self._runtime.cudaMemGetInfo()
        if int(error) != 0:
            raise self._stated(error, "cudaMemGetInfo")
        return int(free), int(total)

    def malloc(self, nbytes: int) -> int:
        """See `Cuda.malloc`."""
        return int(self._call(self._runtime.cudaMalloc, nbytes))

    def free(self, address: int) -> None:
        """See `Cuda.free`."""
        self._call(self._runtime.cudaFree, address)

    def malloc_host(self, nbytes: int) -> int:
        """See `Cuda.malloc_host`."""
        try:
            return int(self._call(self._runtime.cudaHostAlloc, nbytes, self._runtime.cudaHostAllocDefault))
        except OutOfMemoryError as error:
            raise EngineError(
                f"the machine cannot pin {nbytes:,} bytes of host memory", fix="end what else uses much host memory"
            ) from error

    def free_host(self, address: int) -> None:
        """See `Cuda.free_host`."""
        self._call(self._runtime.cudaFreeHost, address)

    def copy_to_device(self, device: int, host: int, nbytes: int, stream: int) -> None:
        """See `Cuda.copy_to_device`."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call(self._runtime.cudaMemcpyAsync, device, host, nbytes, kind, stream)

    def copy_to_host(self, host: int, device: int, nbytes: int, stream: int) -> None:
        """See `Cuda.copy_to_host`."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call(self._runtime.cudaMemcpyAsync, host, device, nbytes, kind, stream)

    def create_stream(self) -> int:
        """See `Cuda.create_stream`."""
        return int(self._call(self._runtime.cudaStreamCreateWithFlags, self._runtime.cudaStreamNonBlocking))

    def destroy_stream(self, stream: int) -> None:
        """See `Cuda.destroy_stream`."""
        self._call(self._runtime.cudaStreamDestroy, stream)

    def synchronize(self, stream: int) -> None:
        """See `Cuda.synchronize`."""
        self._call(self._runtime.cudaStreamSynchronize, stream)

    def create_event(self) -> int:
        """See `Cuda.create_event`."""
        return int(self._call(self._runtime.cudaEventCreateWithFlags, self._runtime.cudaEventDisableTiming))

    def destroy_event(self, event: int) -> None:
        """See `Cuda.destroy_event`."""
        self._call(self._runtime.cudaEventDestroy, event)

    def record(self, event: int, stream: int) -> None:
        """See `Cuda.record`."""
        self._call(self._runtime.cudaEventRecord, event, stream)

    def wait(self, stream: int, event: int) -> None:
        """See `Cuda.wait`."""
        self._call(self._runtime.cudaStreamWaitEvent, stream, event, 0)

    def synchronize_event(self, event: int) -> None:
        """See `Cuda.synchronize_event`."""
        self._call(self._runtime.cudaEventSynchronize, event)

    def begin_capture(self, stream: int) -> None:
        """See `Cuda.begin_capture`."""
        mode = self._runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal  # other devices' threads go on
        self._call(self._runtime.cudaStreamBeginCapture, stream, mode)

    def end_capture(self, stream: int) -> int:
        """See `Cuda.end_capture`."""
        recorded = self._call(self._runtime.cudaStreamEndCapture, stream)
        try:
            return int(self._call(self._runtime.cudaGraphInstantiate, recorded, 0))
        finally:
            self._call(self._runtime.cudaGraphDestroy, recorded)

    def launch(self, graph: int, stream: int) -> None:
        """See `Cuda.launch`."""
        self._call(self._runtime.cudaGraphLaunch, graph, stream)

    def destroy_graph(self, graph: int) -> None:
        """See `Cuda.destroy_graph`."""
        self._call(self._runtime.cudaGraphExecDestroy, graph)


_STATED: dict[str, Callable[[], EngineError]] = {
    "cudaErrorInsufficientDriver": lambda: EngineError(
        "the NVIDIA driver is missing or older than this CUDA runtime",
        fix="update the driver, or install the cuda-python that belongs to it",
    ),
    "cudaErrorNoDevice": lambda: NoGpuError(
        "the NVIDIA driver shows no GPU",
        fix="see what nvidia-smi says, and whether CUDA_VISIBLE_DEVICES hides it",
    ),
    "cudaErrorInvalidDevice": lambda: EngineError(
        "there is no GPU of that number",
        fix="see nvidia-smi -L for those there are",
    ),
    "cudaErrorDevicesUnavailable": lambda: EngineError(
        "the GPU is in use by another program, which has it for itself",
        fix="wait for it, or set the compute mode to default: nvidia-smi -c 0",
    ),
    "cudaErrorSystemDriverMismatch": lambda: EngineError(
        "the NVIDIA driver's kernel module and its library are of two versions",
        fix="reboot, which finishes the driver's update",
    ),
    "cudaErrorSystemNotReady": lambda: EngineError(
        "the GPUs' fabric manager is not running",
        fix="start it: systemctl start nvidia-fabricmanager",
    ),
    "cudaErrorIllegalAddress": lambda: EngineError(
        "the GPU read or wrote memory that is not there",
        fix="run with --no-cuda-graphs to see whether that is why, and report this",
    ),
    "cudaErrorLaunchFailure": lambda: EngineError(
        "a kernel crashed on the GPU",
        fix="see nvidia-smi for errors of the GPU, and report this",
    ),
    "cudaErrorECCUncorrectable": lambda: EngineError(
        "the GPU's memory has an error that cannot be corrected",
        fix="reset the GPU",
    ),
    "cudaErrorNoKernelImageForDevice": lambda: EngineError(
        "the engine has no code for this GPU",
        fix="build it for this one; cvx-deploy doctor says what it is",
    ),
}


def _driver_version() -> str:
    """Return the driver's own version, which NVML alone tells; not every cuda-bindings brings NVML along."""
    for ask in (_driver_version_by_bindings, _driver_version_by_pynvml):
        with suppress(Exception):  # ImportError, or one of NVML's, each of which is a class of its own
            return ask()
    return "unknown"


def _driver_version_by_bindings() -> str:
    from cuda.bindings import nvml

    nvml.init_v2()
    return str(nvml.system_get_driver_version())


def _driver_version_by_pynvml() -> str:
    import pynvml

    pynvml.nvmlInit()
    return str(pynvml.nvmlSystemGetDriverVersion())


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"
