"""The ONNX Runtime backend, on the CPU: the engine that runs everywhere."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from onnxruntime.capi import onnxruntime_pybind11_state as errors

from cvx_deploy.bundle import Bundle, Network, dimension
from cvx_deploy.errors import EngineError
from cvx_deploy.progress import Progress, SilentProgress

_ERRORS = (
    errors.Fail,
    errors.InvalidArgument,
    errors.InvalidGraph,
    errors.InvalidProtobuf,
    errors.NotImplemented,
    errors.RuntimeException,
)


class OrtSession:
    """One network in an ONNX Runtime session."""

    def __init__(self, name: str, network: Network, session: onnxruntime.InferenceSession) -> None:
        self._name = name
        self._outputs = [spec.name for spec in network.outputs]
        self._session = session

    def run(self, inputs: Mapping[str, Any]) -> dict[str, onnxruntime.OrtValue]:
        """Run the network once."""
        values = {name: _value(tensor) for name, tensor in inputs.items()}
        try:
            results = self._session.run_with_ort_values(self._outputs, values)
        except _ERRORS as error:
            raise EngineError(
                f"ONNX Runtime failed in {self._name}: {_first_line(error)}",
                fix="export the bundle again; if that does not help, report this",
            ) from error
        return dict(zip(self._outputs, results, strict=True))


class OrtBackend:
    """Runs a bundle on the CPU.

    Weights are mapped from where they lie and handed to the session as memory, so that they need not lie beside the
    graph.

    Args:
        bundle: What to run.
        threads: Threads within an operator; None for one per core.
        progress: Told when a weight file must be hashed again, which takes a while on a large one.
    """

    def __init__(self, bundle: Bundle, threads: int | None = None, progress: Progress | None = None) -> None:
        if bundle.manifest.precision == "bf16":
            raise EngineError(
                f"{bundle.path} computes in bf16, which ONNX Runtime has no CPU kernels for",
                fix="export with --precision fp32 to run it here",
            )
        self.bundle = bundle
        self._threads = threads
        self._progress = progress or SilentProgress()
        self._mapped: dict[str, NDArray[np.uint8]] = {}

    @contextlib.contextmanager
    def load(self, role: str, sizes: Mapping[str, int]) -> Iterator[OrtSession]:
        """Load a network for the block; see `Backend.load`."""
        described = self.bundle.network(role)
        graph = self.bundle.onnx_path(role).read_bytes()
        options = self._options(described, dict(sizes))
        try:
            session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        except _ERRORS as error:
            raise EngineError(
                f"ONNX Runtime cannot load {role}: {_first_line(error)}",
                fix="export the bundle again with this version of cvx-deploy",
            ) from error
        yield OrtSession(role, described, session)

    def to_host(self, tensor: onnxruntime.OrtValue) -> NDArray[Any]:
        """Return the tensor's values."""
        array: NDArray[Any] = tensor.numpy()
        return array

    def _options(self, network: Network, sizes: dict[str, int]) -> onnxruntime.SessionOptions:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # what fails is raised; warnings about the graph say nothing to a user
        if self._threads is not None:
            options.intra_op_num_threads = self._threads
        symbols = {size for spec in network.inputs for size in spec.shape if isinstance(size, str)}
        for symbol in sorted(symbols):
            options.add_free_dimension_override_by_name(symbol, dimension(symbol, sizes))
        if network.weights:
            arrays = [self._map(name) for name in network.weights]
            options.add_external_initializers_from_files_in_memory(
                list(network.weights), arrays, [array.nbytes for array in arrays]
            )
        return options

    def _map(self, name: str) -> NDArray[np.uint8]:
        if name not in self._mapped:
            self._mapped[name] = np.memmap(self.bundle.weight_path(name, self._progress), np.uint8, mode="r")
        return self._mapped[name]


def _value(tensor: Any) -> onnxruntime.OrtValue:
    if isinstance(tensor, onnxruntime.OrtValue):
        return tensor
    return onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(tensor))


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
