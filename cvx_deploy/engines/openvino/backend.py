"""The OpenVINO backend: on a CPU the fastest engine, in fp32, and in bf16 where the CPU multiplies matrices of it."""

import contextlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import openvino
from numpy.typing import NDArray

from cvx_deploy.bundle.opened import Bundle
from cvx_deploy.bundle.schema import Network, numpy_dtype
from cvx_deploy.engines.backend import refuse_bfloat16
from cvx_deploy.engines.openvino.spec import streams
from cvx_deploy.engines.openvino.winograd import halve_products
from cvx_deploy.engines.residency import LoadedNetworks, Policy
from cvx_deploy.engines.weights import mapped_weights
from cvx_deploy.errors import EngineError
from cvx_deploy.graph.bounded import bounded_graph
from cvx_deploy.graph.streamed import stream_weights
from cvx_deploy.measure.cpu import overflows_in_int8
from cvx_deploy.precision import Precision
from cvx_deploy.progress import Progress, SilentProgress
from cvx_deploy.terminal import safe

_CPU = "CPU"
_HINTS: dict[Precision, str] = {"fp32": "f32", "fp16": "f16", "bf16": "bf16"}
_EXACT = frozenset({"modulation"})
"""Networks that compute in fp32 at any precision: OpenVINO would round angles of up to 999 to 8 bits.

On a tiny 5b the relative error would be 0.29, where it is 0.004.
"""
_POLL_MS = 100

_Weights = dict[str, NDArray[np.uint8]]


class OpenVinoSession:
    """One compiled network; its tensors are NumPy arrays, which OpenVINO reads and writes in place."""

    def __init__(self, name: str, network: Network, compiled: openvino.CompiledModel, weights: _Weights) -> None:
        self._name = name
        types = {spec.name: numpy_dtype(spec.dtype) for spec in network.outputs}
        wanted = types.keys()
        self._weights = weights  # OpenVINO does not hold on to the maps whose bytes it reads
        self._outputs = {
            next(iter(wanted & out.names)): (tuple(out.shape), types[next(iter(wanted & out.names))])
            for out in compiled.outputs
        }  # a tensor can have other names besides
        self._request = compiled.create_infer_request()
        for given in compiled.inputs:  # those that are streamed
            if (stored := weights.get(given.any_name)) is not None:
                tensor = openvino.Tensor(stored, given.get_shape(), given.get_element_type())
                self._request.set_tensor(given, tensor)

    def close(self) -> None:
        """Free the network."""
        del self._request, self._weights

    def run(self, inputs: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
        """Run the network once; Ctrl-C stops in the middle of it."""
        # New arrays each time: outputs of the run before must stay as they are.
        outputs = {name: np.empty(shape, dtype) for name, (shape, dtype) in self._outputs.items()}
        arrays = {name: np.ascontiguousarray(array) for name, array in inputs.items()} | outputs
        try:
            for name, array in arrays.items():
                self._request.set_tensor(name, _shared(array))
            self._request.start_async()
            self._wait()
        except RuntimeError as error:
            again = "run: cvx-deploy verify --bundle DIR; if the bundle is sound, report this"
            raise EngineError(f"OpenVINO failed in {self._name}: {_told(error)}", fix=again) from error
        return outputs

    def _wait(self) -> None:
        """Wait in short pieces: what waits for long inside OpenVINO hears of no signal."""
        try:
            while not self._request.wait_for(_POLL_MS):
                pass
        except BaseException:
            self._request.cancel()
            with contextlib.suppress(RuntimeError):  # which says that it was cancelled
                self._request.wait()
            raise


class OpenVinoBackend(LoadedNetworks[OpenVinoSession]):
    """Runs a bundle on the CPU in the bundle's own precision.

    Weights are mapped from where they lie and handed over as memory: they need not lie beside the graph, and are
    read once, when OpenVINO arranges them for its kernels.

    Args:
        bundle: What to run.
        threads: Threads within an operator; None for one per core.
        progress: Told when a weight file must be hashed again, which takes a while on a large one.
        residency: Which networks stay loaded.

    Raises:
        EngineError: This CPU does not compute in the bundle's precision.
    """

    def __init__(
        self,
        bundle: Bundle,
        threads: int | None = None,
        progress: Progress | None = None,
        *,
        residency: Policy = "resident",
    ) -> None:
        self._core, self._progress = openvino.Core(), progress or SilentProgress()
        super().__init__(bundle, residency, self._progress, OpenVinoSession.close)
        self._threads = {} if threads is None else {"INFERENCE_NUM_THREADS": threads}
        for precision in sorted(bundle.manifest.computes_in.difference(precisions())):
            raise EngineError(
                f"{bundle.path} computes in {precision}, which this CPU has no instructions for",
                fix="export with --precision fp32 to run it here",
            )
        if "fp8" in bundle.manifest.multiplies_in:
            raise EngineError(
                f"{bundle.path} multiplies in fp8, which no CPU can",
                fix="export with --precision int8/fp32 or fp32, or run it with --engine tensorrt-rtx or tensorrt",
            )
        if "int8" in bundle.manifest.multiplies_in and overflows_in_int8():
            raise EngineError(
                f"{bundle.path} multiplies in int8, whose sums overflow in OpenVINO on this CPU: it has no VNNI",
                fix="run it with --engine onnxruntime, or export with --precision int8wo/fp32 or fp32",
            )

    def _loaded(self, bundle: Bundle, role: str, sizes: dict[str, int]) -> OpenVinoSession:
        described = bundle.network(role)
        try:
            model, weights = self._model(bundle, role)
            compiled = self._compiled(model, role, described, sizes)
        except RuntimeError as error:
            again = "export the bundle again with this version of cvx-deploy, or run it with --engine onnxruntime"
            raise EngineError(f"OpenVINO cannot load {role}: {_told(error)}", fix=again) from error
        return OpenVinoSession(role, described, compiled, weights)

    def to_device(self, array: NDArray[Any]) -> NDArray[Any]:
        """Return the values: the device is the host."""
        return array

    def to_host(self, tensor: NDArray[Any]) -> NDArray[Any]:
        """Return the tensor's values."""
        refuse_bfloat16(tensor.dtype.name)
        return tensor

    def _compiled(self, model: openvino.Model, role: str, described: Network, sizes: dict[str, int]) -> Any:
        model.reshape({spec.name: list(spec.resolve(sizes)) for spec in described.inputs})
        precision: Precision = "fp32" if role in _EXACT else described.precision
        if precision == "fp32":
            halve_products(model)
        settings = {
            "INFERENCE_PRECISION_HINT": _HINTS[precision],  # by default it is bf16 wherever the CPU is fast in it
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,  # or it quantizes activations where the graph does not
            "PERFORMANCE_HINT": "LATENCY",  # all threads for the one run there is
            **self._threads,
        }
        return self._core.compile_model(model, _CPU, settings)

    def _model(self, bundle: Bundle, role: str) -> tuple[openvino.Model, _Weights]:
        """Read a graph, with its weights as inputs at first, which then become constants over the mapped bytes.

        Left to itself OpenVINO copies each weight when it reads a graph from memory, and for a graph on disk it wants
        the weights in the folder of the graph.
        """
        import onnx

        _, proto = bounded_graph(bundle, role)
        weights = mapped_weights(bundle, bundle.network_name(role), proto.graph, self._progress)
        large = streams(role, sum(each.nbytes for each in weights.values()))
        streamed = {weight.name for weight in stream_weights(proto)} if large else set[str]()
        for stored in _take_external(proto.graph):
            proto.graph.input.append(onnx.helper.make_tensor_value_info(stored.name, stored.data_type, stored.dims))
        model = self._core.read_model(proto.SerializeToString())
        for parameter in model.get_parameters():
            stored_bytes = weights.get(parameter.output(0).any_name)
            if stored_bytes is not None and not streamed.intersection(parameter.output(0).names):
                parameter.output(0).replace(_constant(parameter, stored_bytes).output(0))
                model.remove_parameter(parameter)
        return model, weights


def precisions() -> list[Precision]:
    """Return what this CPU computes in."""
    known = openvino.Core().get_property(_CPU, "OPTIMIZATION_CAPABILITIES")
    return [precision for precision in _HINTS if precision.upper() in known]


def _shared(array: NDArray[Any]) -> openvino.Tensor:
    """Return a tensor over an array's own memory."""
    if array.dtype.name != "bfloat16":
        return openvino.Tensor(array, shared_memory=True)
    return openvino.Tensor(array.view(np.uint16), openvino.Shape(array.shape), openvino.Type.bf16)


def _take_external(graph: Any) -> list[Any]:
    """Take the initializers out of an ONNX graph whose bytes lie elsewhere, and return them."""
    external = [tensor for tensor in graph.initializer if tensor.external_data]
    for tensor in external:
        graph.initializer.remove(tensor)
    return external


def _constant(parameter: Any, stored: NDArray[np.uint8]) -> Any:
    """Return a constant of a parameter's type and shape over bytes that stay where they are."""
    kind, shape = parameter.get_element_type(), parameter.output(0).shape
    return openvino.op.Constant(openvino.Tensor(stored, shape, kind), shared_memory=True)


def _told(error: RuntimeError) -> str:
    """Return what OpenVINO says went wrong, without the places in its sources that come before."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = [line for line in lines if not line.startswith(("Exception from", "Check '"))]
    return safe((told or lines or ["it did not say why"])[-1], 300)
