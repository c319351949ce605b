"""The seam to the driver, on machines with and without one."""

import builtins
import enum
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from cvx_deploy.engines import cuda as cuda_module
from cvx_deploy.engines.cuda import CudaPython, Gpu
from cvx_deploy.engines.tensorrt.platforms import platform_here
from cvx_deploy.errors import EngineError, OutOfMemoryError

runtime = pytest.importorskip("cuda.bindings.runtime")


class Error(enum.IntEnum):
    cudaSuccess = 0  # noqa: N815
    cudaErrorMemoryAllocation = 2  # noqa: N815
    cudaErrorInsufficientDriver = 35  # noqa: N815
    cudaErrorNoDevice = 100  # noqa: N815
    cudaErrorStreamCaptureInvalidated = 901  # noqa: N815


def driver(monkeypatch: pytest.MonkeyPatch, **answers: Any) -> None:
    """Let the bindings answer as a driver would: what is not given succeeds with 1."""
    found = {name: getattr(runtime, name) for name in dir(runtime) if not callable(getattr(runtime, name))}
    known = {"cudaDriverGetVersion": 13000, "cudaRuntimeGetVersion": 13000, "cudaGetDeviceCount": 1}
    enums = {name: getattr(runtime, name) for name in ("cudaMemcpyKind", "cudaStreamCaptureMode")}

    def call(name: str, *values: Any) -> Any:
        def function(*_: Any) -> Any:
            return values if values and isinstance(values[0], Error) else (Error.cudaSuccess, *values)

        function.__name__ = name
        return function

    names = [name for name in dir(runtime) if name.startswith("cuda") and callable(getattr(runtime, name))]
    calls = {name: call(name, *_tuple((known | answers).get(name, 1))) for name in names if name not in enums}
    calls["cudaGetErrorString"] = lambda error: (Error.cudaSuccess, f"words for {error.name}".encode())
    fake = SimpleNamespace(**found, **enums, **calls)
    monkeypatch.setattr(sys.modules["cuda.bindings"], "runtime", fake)
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", fake)


def _tuple(answer: Any) -> tuple[Any, ...]:
    return answer if isinstance(answer, tuple) else (answer,)


@pytest.mark.skipif(runtime.cudaDriverGetVersion()[1] != 0, reason="this machine has a driver")
def test_a_machine_without_a_driver_is_told_so() -> None:
    with pytest.raises(EngineError, match="this machine has no NVIDIA driver") as raised:
        CudaPython()
    assert "--engine onnxruntime" in raised.value.fix


def test_without_cuda_python_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    load = builtins.__import__

    def importing(name: str, *rest: Any) -> Any:
        if name.startswith("cuda"):
            raise ImportError("No module named 'cuda'")
        return load(name, *rest)

    monkeypatch.setattr(builtins, "__import__", importing)
    with pytest.raises(EngineError, match="cuda-python") as raised:
        CudaPython()
    assert raised.value.fix.startswith("pip install")


def test_a_driver_that_is_too_old_is_stated(monkeypatch: pytest.MonkeyPatch) -> None:
    driver(monkeypatch, cudaDriverGetVersion=12040)
    with pytest.raises(EngineError, match=r"too old: it does CUDA 12\.4, and this needs 13\.0") as raised:
        CudaPython()
    assert "cuda-python==12.*" in raised.value.fix


@pytest.mark.parametrize(
    ("error", "what"),
    [
        (Error.cudaErrorNoDevice, "shows no GPU"),
        (Error.cudaErrorInsufficientDriver, "missing or older"),
        (Error.cudaErrorStreamCaptureInvalidated, "words for cudaErrorStreamCaptureInvalidated"),
    ],
)
def test_every_error_of_the_driver_is_stated_with_a_fix(
    error: Error, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver(monkeypatch, cudaGetDeviceCount=(error, None))
    with pytest.raises(EngineError, match=what) as raised:
        CudaPython()
    assert raised.value.fix


def test_the_stated_errors_are_ones_that_cuda_has() -> None:
    assert all(hasattr(runtime.cudaError_t, name) for name in cuda_module._STATED)


def test_a_device_that_is_not_there_is_stated(monkeypatch: pytest.MonkeyPatch) -> None:
    driver(monkeypatch, cudaGetDeviceCount=2)
    with pytest.raises(EngineError, match="no GPU 2: this machine shows 2"):
        CudaPython().gpu(2)


def without_nvml(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Let modules be missing, as ``cuda.bindings.nvml`` is before cuda-bindings 13.2."""
    for name in names:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delattr(sys.modules["cuda.bindings"], "nvml", raising=False)


def properties(monkeypatch: pytest.MonkeyPatch) -> None:
    found = SimpleNamespace(name=b"NVIDIA H100 80GB HBM3", major=9, minor=0, totalGlobalMem=80 * 2**30)
    driver(monkeypatch, cudaGetDeviceProperties=found)


def test_a_driver_whose_version_nothing_tells_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    properties(monkeypatch)
    without_nvml(monkeypatch, "cuda.bindings.nvml", "pynvml")
    assert CudaPython().gpu(0) == Gpu("NVIDIA H100 80GB HBM3", "sm90", 80 * 2**30, "unknown")


def test_without_nvml_in_the_bindings_nvidia_ml_py_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    properties(monkeypatch)
    without_nvml(monkeypatch, "cuda.bindings.nvml")
    pynvml = SimpleNamespace(nvmlInit=lambda: None, nvmlSystemGetDriverVersion=lambda: "580.65.06")
    monkeypatch.setitem(sys.modules, "pynvml", pynvml)
    assert CudaPython().gpu(0).driver == "580.65.06"


def test_only_a_machine_that_shows_no_gpu_counts_as_one_without(monkeypatch: pytest.MonkeyPatch) -> None:
    driver(monkeypatch, cudaGetDeviceCount=(Error.cudaErrorNoDevice, None))
    assert platform_here() is None
    driver(monkeypatch, cudaDriverGetVersion=12040)
    with pytest.raises(EngineError, match="driver is too old"):
        platform_here()
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(EngineError, match="needs the package cuda-python"):
        platform_here()


def test_device_memory_that_is_full_is_an_error_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    full = (Error.cudaErrorMemoryAllocation, None)
    driver(monkeypatch, cudaMalloc=full, cudaHostAlloc=full)
    with pytest.raises(OutOfMemoryError, match="the device is out of memory"):
        CudaPython().malloc(1)
    with pytest.raises(EngineError, match="cannot pin 1 bytes of host memory") as raised:
        CudaPython().malloc_host(1)
    assert not isinstance(raised.value, OutOfMemoryError)


def test_a_capture_that_failed_leaves_no_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    driver(monkeypatch, cudaStreamEndCapture=7, cudaGraphInstantiate=(Error.cudaErrorStreamCaptureInvalidated, None))
    destroyed: list[int] = []
    device = CudaPython()

    def destroy(graph: int) -> tuple[Error]:
        destroyed.append(graph)
        return (Error.cudaSuccess,)

    device._runtime.cudaGraphDestroy = destroy
    with pytest.raises(EngineError):
        device.end_capture(1)
    assert destroyed == [7]


@pytest.mark.skipif(runtime.cudaDriverGetVersion()[1] != 0, reason="this machine has a driver")
def test_every_call_has_the_arguments_that_the_bindings_take() -> None:
    """Without a driver each call reaches the bindings and fails there, after its arguments were taken."""
    device = CudaPython.__new__(CudaPython)
    device._runtime = runtime
    calls: list[tuple[Any, ...]] = [
        (device.use, 0),
        (device.memory_info,),
        (device.malloc, 8),
        (device.malloc_host, 8),
        (device.copy_to_device, 256, 512, 8, 1),
        (device.copy_to_host, 512, 256, 8, 1),
        (device.create_stream,),
        (device.create_event,),
        (device.gpu, 0),
        (device.free, 256),
        (device.free_host, 256),
        (device.destroy_stream, 5),
        (device.synchronize, 5),
        (device.destroy_event, 5),
        (device.record, 5, 6),
        (device.wait, 5, 6),
        (device.synchronize_event, 5),
        (device.begin_capture, 5),
        (device.end_capture, 5),
        (device.launch, 5, 6),
        (device.destroy_graph, 5),
    ]
    for call, *arguments in calls:
        with pytest.raises(EngineError, match="missing or older than this CUDA runtime"):
            call(*arguments)
