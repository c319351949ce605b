"""ONNX Runtime with a GPU that is not there: tensors are marked with where they lie, and the CPU computes.

Every copy, binding and run is kept in order. What lies in the wrong place is refused, as on a GPU it would be.
"""

import contextlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnxruntime.capi import onnxruntime_pybind11_state as native

_InferenceSession, _OrtValue = onnxruntime.InferenceSession, onnxruntime.OrtValue


NO_CUDNN = native.NotImplemented(
    "[ONNXRuntimeError] : 9 : NOT_IMPLEMENTED : Non-zero status code returned while running Conv node. Name:'' Status "
    "Message: /onnxruntime_src/onnxruntime/core/providers/cuda/cuda_kernel.h:296 static cudnnContext* onnxruntime::cuda"
    "::CudaKernel::RequireCudnnHandle(cudnnHandle_t) [ONNXRuntimeError] : 9 : NOT_IMPLEMENTED : cuDNN is unavailable "
    "or disabled for CUDA Execution Provider: dlopen failed for libcudnn.so: libcudnn.so: cannot open shared object"
)
"""What ONNX Runtime 1.31 says at the first convolution where cuDNN is missing."""


@dataclass(frozen=True)
class Event:
    """Something that was asked of ONNX Runtime.

    Attributes:
        what: load, upload, input, output, run or download.
        name: Of the tensor, for bindings.
        value: Which tensor, by its identity.
    """

    what: str
    name: str = ""
    value: int = 0


class FakeOnnxRuntime:
    """Stands in for the parts of ``onnxruntime`` that a backend on one GPU uses.

    Attributes:
        events: What happened, in order.
        providers: What sessions were asked to run on.
        graphs: The ONNX files that sessions were made of, and `patterns` whether each lays its memory out beforehand.
        failures: What to raise, by what is asked: load, upload, run.
        on_cpu: The kinds of operators that are left to the CPU.
        usable: Whether sessions get the CUDA provider that they ask for.
    """

    def __init__(self, patch: pytest.MonkeyPatch, device: int = 0) -> None:
        self.device = device
        self.events: list[Event] = []
        self.providers: list[Any] = []
        self.graphs: list[bytes] = []
        self.patterns: list[bool] = []
        self.failures: dict[str, Exception] = {}
        self.on_cpu: set[str] = set()
        self.usable = True
        self.values: list[Any] = []  # kept, so that no two have the same identity
        fake = self

        class Value(_Value):
            runtime = fake

        class Session(_Session):
            runtime = fake

        patch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
        patch.setattr(onnxruntime, "preload_dlls", lambda: None)
        patch.setattr(onnxruntime, "set_default_logger_severity", lambda _: None)
        patch.setattr(onnxruntime, "OrtValue", Value)
        patch.setattr(onnxruntime, "InferenceSession", Session)
        self.value_type = Value

    def happened(self, what: str, name: str = "", value: int = 0) -> None:
        """Keep an event, or fail with what was to be raised there."""
        if what in self.failures:
            raise self.failures[what]
        self.events.append(Event(what, name, value))

    def words(self) -> list[str]:
        """Return the events as words, such as ``input latents``."""
        return [f"{event.what} {event.name}".strip() for event in self.events]

    def here(self, kind: str, number: int) -> None:
        """Refuse a place that is not this GPU."""
        assert (kind, number) == ("cuda", self.device), f"{kind}:{number}"


class _Value:
    """A tensor on the GPU."""

    runtime: FakeOnnxRuntime

    def __init__(self, real: onnxruntime.OrtValue) -> None:
        self.real = real
        self.runtime.values.append(self)

    @classmethod
    def ortvalue_from_numpy(cls, array: NDArray[Any], device_type: str = "cpu", device_id: int = 0) -> "_Value":
        cls.runtime.here(device_type, device_id)
        value = cls(_OrtValue.ortvalue_from_numpy(array.copy()))
        cls.runtime.happened("upload", value=id(value))
        return value

    def data_type(self) -> str:
        return str(self.real.data_type())

    def numpy(self) -> NDArray[Any]:
        self.runtime.happened("download", value=id(self))
        return np.array(self.real.numpy())


class _Session:
    """A session whose networks the CPU runs."""

    runtime: FakeOnnxRuntime
    _told = False

    def __init__(
        self,
        graph: bytes,
        options: Any,
        providers: list[Any],
        enable_fallback: int,
        disabled_optimizers: list[str],
    ) -> None:
        assert enable_fallback == 0, "it would go on without the GPU"
        self.runtime.providers.append(providers)
        self.runtime.graphs.append(graph)
        self.runtime.patterns.append(options.enable_mem_pattern)
        self.runtime.happened("load")
        with contextlib.suppress(RuntimeError):  # it was not set
            self._told = options.get_session_config_entry("session.record_ep_graph_assignment_info") == "1"
        self._real = _InferenceSession(
            graph, options, providers=["CPUExecutionProvider"], disabled_optimizers=disabled_optimizers
        )

    def get_providers(self) -> list[str]:
        return [*(["CUDAExecutionProvider"] if self.runtime.usable else []), "CPUExecutionProvider"]

    def get_provider_graph_assignment_info(self) -> list[Any]:
        assert self._told, "the session was not asked to keep it"
        nodes = [node for part in self._real.get_provider_graph_assignment_info() for node in part.get_nodes()]
        left = [node for node in nodes if node.op_type in self.runtime.on_cpu]
        gone = [node for node in nodes if node.op_type not in self.runtime.on_cpu]
        return [_Part("CPUExecutionProvider", left), _Part("CUDAExecutionProvider", gone)]

    def run(self, outputs: None, inputs: dict[str, NDArray[Any]]) -> list[Any]:
        self.runtime.happened("run")
        found: list[Any] = self._real.run(outputs, inputs)
        return found

    def io_binding(self) -> "_Binding":
        return _Binding(self.runtime, self._real.io_binding())

    def run_with_iobinding(self, binding: "_Binding", options: onnxruntime.RunOptions) -> None:
        self.runtime.happened("run")
        self._real.run_with_iobinding(binding.real, options)


@dataclass(frozen=True)
class _Part:
    """The operators that one provider runs."""

    ep_name: str
    nodes: list[Any]

    def get_nodes(self) -> list[Any]:
        return self.nodes


class _Binding:
    """What a run takes, and where its outputs go."""

    def __init__(self, runtime: FakeOnnxRuntime, real: onnxruntime.IOBinding) -> None:
        self._runtime, self.real = runtime, real

    def bind_ortvalue_input(self, name: str, value: _Value) -> None:
        assert isinstance(value, _Value), f"{name} does not lie on the GPU"
        self._runtime.happened("input", name, id(value))
        self.real.bind_ortvalue_input(name, value.real)

    def bind_output(self, name: str, device_type: str = "cpu", device_id: int = 0) -> None:
        self._runtime.here(device_type, device_id)
        self._runtime.happened("output", name)
        self.real.bind_output(name)

    def get_outputs(self) -> list[_Value]:
        return [self._runtime.value_type(value) for value in self.real.get_outputs()]
