"""The ONNX Runtime backend: on the CPU, the engine that runs everywhere, or on a GPU with its CUDA provider."""

import contextlib
import io
import os
import re
from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from onnxruntime.capi import onnxruntime_pybind11_state as errors

from cvx_deploy.bundle.opened import Bundle
from cvx_deploy.bundle.schema import Network, dimension
from cvx_deploy.engines.backend import refuse_bfloat16
from cvx_deploy.engines.endable import endable
from cvx_deploy.engines.onnxruntime.graphs import graph_for_cpu, graph_for_cuda, streamed
from cvx_deploy.engines.residency import LoadedNetworks, Policy
from cvx_deploy.engines.weights import mapped_file, mapped_weights
from cvx_deploy.errors import BundleError, EngineError, OutOfMemoryError
from cvx_deploy.graph.bounded import bounded_graph
from cvx_deploy.graph.streamed import Streamed
from cvx_deploy.install import pip_install
from cvx_deploy.measure.cpu import overflows_in_int8
from cvx_deploy.progress import Progress, SilentProgress
from cvx_deploy.reading import reading
from cvx_deploy.terminal import no_foreign_lines, safe

_ERRORS = (
    errors.EPFail,
    errors.Fail,
    errors.InvalidArgument,
    errors.InvalidGraph,
    errors.InvalidProtobuf,
    errors.NotImplemented,
    errors.RuntimeException,
    RuntimeError,  # what its bindings raise, for a copy that fails for example
)
_SILENT = 4  # what fails is raised, in one line; what ONNX Runtime says of it besides is coloured and long
onnxruntime.set_default_logger_severity(_SILENT)
_CUDA = "CUDAExecutionProvider"
_BFLOAT16 = 16  # onnx.TensorProto.BFLOAT16
_DEVICE = re.compile(r"\b(?:CUDA|CUBLAS|CUDNN|CURAND|cuDNN) (?:failure|error|is unavailable)")
_OUT_OF_MEMORY = re.compile(r"out of memory|failed to allocate memory|available memory of|_ALLOC_FAILED", re.IGNORECASE)

_EXACT = ("session.x64quantprecision", "1")
"""For int8 on a CPU that sums in 16 bits, which overflow: products another way, at 1.7 of the time. For weights alone
it breaks the graph."""
_EXACT_WEIGHTS = ("session.qdq_matmulnbits_accuracy_level", "1")
"""Where weights alone are quantized, activations stay float32; by default they are quantized as well, to int8."""


class OrtSession:
    """One network in an ONNX Runtime session, and where its tensors lie."""

    def __init__(
        self,
        name: str,
        network: Network,
        session: onnxruntime.InferenceSession,
        memory: "_Memory",
        weights: list[NDArray[np.uint8]],
        streamed: Mapping[str, onnxruntime.OrtValue],
    ) -> None:
        self._name = name
        self._streamed = streamed
        self._weights = weights  # mapped, and read again where ONNX Runtime did not arrange them anew
        self._outputs = [spec.name for spec in network.outputs]
        self._session = session
        self._memory = memory

    def close(self) -> None:
        """Free the network."""
        del self._session

    def run(self, inputs: Mapping[str, Any]) -> dict[str, onnxruntime.OrtValue]:
        """Run the network once."""
        try:
            values = {name: self._memory.hold(tensor) for name, tensor in inputs.items()}
            binding = self._session.io_binding()  # a new one each time: outputs of the run before must stay as they are
            for name, value in (*self._streamed.items(), *values.items()):
                binding.bind_ortvalue_input(name, value)
            for name in self._outputs:
                binding.bind_output(name, self._memory.kind, self._memory.number)
            options = onnxruntime.RunOptions()
            options.log_severity_level = _SILENT
            call = partial(self._session.run_with_iobinding, binding, options)
            endable(call, lambda: setattr(options, "terminate", True))
            return dict(zip(self._outputs, binding.get_outputs(), strict=True))
        except _ERRORS as error:
            again = "run: cvx-deploy verify --bundle DIR; if the bundle is sound, report this"
            _fail(f"ONNX Runtime failed in {self._name}", error, fix=again, on_gpu=self._memory.on_gpu)


class OrtBackend(LoadedNetworks[OrtSession]):
    """Runs a bundle on the CPU, or on a GPU.

    Weights are mapped from where they lie and handed to the session as memory, so that they need not lie beside the
    graph. On a GPU the outputs of a run stay there, for the runs that take them.

    Args:
        bundle: What to run.
        threads: Threads within an operator on the CPU; None for one per core.
        progress: Told when a weight file must be hashed again, which takes a while on a large one.
        device: The CUDA device; None for the CPU.
        reference: Whether to run what the CPU multiplies in float32 for want of kernels, fp8: slow, and right.
        residency: Which networks stay loaded.
        optimized: A folder for ``ROLE.onnx`` of every network that is loaded: the graph as it is run, without weights.

    Raises:
        EngineError: The CPU has no kernels for this precision, or ONNX Runtime cannot use that GPU.
    """

    def __init__(
        self,
        bundle: Bundle,
        threads: int | None = None,
        progress: Progress | None = None,
        device: int | None = None,
        *,
        reference: bool = False,
        residency: Policy = "resident",
        optimized: Path | None = None,
    ) -> None:
        if device is not None:
            check_device(device)
            _check_quantization(bundle)
        else:
            _check_precision(bundle, reference=reference)
        self._memory, self._loads_ahead = _Memory(device), device is None
        self._threads = threads
        self._optimized = optimized
        self._progress = progress or SilentProgress()
        super().__init__(bundle, residency, self._progress, OrtSession.close)

    def _loaded(self, bundle: Bundle, role: str, sizes: dict[str, int]) -> OrtSession:
        described = bundle.network(role)
        stored, proto = bounded_graph(bundle, role)
        with reading(bundle.onnx_path(role), BundleError, fix=bundle.remedy), no_foreign_lines():
            if self._memory.on_gpu:
                graph = graph_for_cuda(stored, described)
            else:
                graph = graph_for_cpu(stored, described, sizes)
        weights = [mapped_file(bundle, name, self._progress) for name in described.weights]
        inputs: dict[str, onnxruntime.OrtValue] = {}
        if not self._memory.on_gpu and not role.startswith("vae"):
            graph, large = streamed(graph, described, sum(array.nbytes for array in weights))
            if large:
                bytes_of = mapped_weights(bundle, bundle.network_name(role), proto.graph, self._progress)
                inputs = {weight.name: _held_in_file(weight, bytes_of[weight.name]) for weight in large}
        options = self._options(role, described, sizes, weights)
        if inputs:
            options.enable_mem_pattern = False  # it would plan for all that is made of weights at once
        if self._optimized is not None:
            _keep_graph(options, self._optimized / f"{role}.onnx")
        providers = self._memory.providers
        try:
            make = partial(
                onnxruntime.InferenceSession,
                graph,
                options,
                providers=providers,
                enable_fallback=0,
                disabled_optimizers=_disabled(described),
            )
            session = endable(make, lambda: options.set_load_cancellation_flag(True))
        except _ERRORS as error:
            again = "export the bundle again with this version of cvx-deploy"
            other = f"{again}, or with --precision fp16 or fp32, or run it with another --engine"
            on_gpu = self._memory.on_gpu
            _fail(f"ONNX Runtime cannot load {role}", error, fix=other if on_gpu else again, on_gpu=on_gpu)
        if self._memory.on_gpu and _CUDA not in session.get_providers():  # it goes on without, and does not say so
            raise EngineError(f"ONNX Runtime would run {role} on the CPU: it cannot use CUDA here", fix=_LIBRARIES)
        if self._memory.on_gpu:
            self._note_what_stays(role, session)
            self._note_what_is_widened(role, described)
        return OrtSession(role, described, session, self._memory, weights, inputs)

    def to_device(self, array: NDArray[Any]) -> onnxruntime.OrtValue:
        """Return the values as ONNX Runtime holds them."""
        try:
            return self._memory.hold(array)
        except _ERRORS as error:
            _fail("ONNX Runtime cannot copy to the GPU", error, fix=_LIBRARIES)

    def to_host(self, tensor: onnxruntime.OrtValue) -> NDArray[Any]:
        """Return the tensor's values."""
        try:
            refuse_bfloat16(tensor.data_type().removeprefix("tensor(").removesuffix(")"))
            array: NDArray[Any] = tensor.numpy()
        except _ERRORS as error:
            _fail("ONNX Runtime cannot copy from the GPU", error, fix=_LIBRARIES)
        return array

    def _note_what_stays(self, role: str, session: onnxruntime.InferenceSession) -> None:
        """Tell which operators of a network CUDA has no kernels for: the CPU runs them, and their tensors go there."""
        assigned = [(part.ep_name, part.get_nodes()) for part in session.get_provider_graph_assignment_info()]
        here = Counter(node.op_type for provider, nodes in assigned for node in nodes if provider != _CUDA)
        if here:
            kinds = ", ".join(f"{count} {kind}" for kind, count in here.most_common())
            every = sum(len(nodes) for _, nodes in assigned)
            self._progress.note(f"note: the CPU runs {here.total()} of the {every} operators of {role}: {kinds}")

    def _note_what_is_widened(self, role: str, network: Network) -> None:
        """Tell that few bits save no time on CUDA: quantized layers are multiplied in the type around them."""
        if network.quantization is not None:
            self._progress.note(
                f"note: ONNX Runtime multiplies the {network.quantization.scheme} layers of {role} in "
                f"{network.precision} on a GPU; --engine tensorrt and tensorrt-rtx multiply in few bits"
            )

    def _options(
        self, role: str, network: Network, sizes: dict[str, int], weights: list[NDArray[np.uint8]]
    ) -> onnxruntime.SessionOptions:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = _SILENT
        if self._memory.on_gpu:
            options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        if self._memory.on_gpu or role.startswith("vae"):
            options.enable_mem_pattern = False  # one block for a whole run, laid out once: larger than what is needed
        if self._threads is not None:
            options.intra_op_num_threads = self._threads
        if network.quantization is not None:
            if network.quantization.scheme != "int8":
                options.add_session_config_entry(*_EXACT_WEIGHTS)
            elif overflows_in_int8():
                options.add_session_config_entry(*_EXACT)
        symbols = {size for spec in network.inputs for size in spec.shape if isinstance(size, str)}
        for symbol in sorted(symbols):
            options.add_free_dimension_override_by_name(symbol, dimension(symbol, sizes))
        if network.weights:
            options.add_external_initializers_from_files_in_memory(
                list(network.weights), weights, [array.nbytes for array in weights]
            )
        return options


def _held_in_file(weight: Streamed, content: NDArray[np.uint8]) -> onnxruntime.OrtValue:
    """Return a weight over the mapped bytes of its file."""
    import onnx

    dtype = onnx.helper.tensor_dtype_to_np_dtype(weight.kind)
    if dtype.name == "bfloat16":
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(
            content.view(np.uint16).reshape(weight.shape), weight.kind
        )
    return onnxruntime.OrtValue.ortvalue_from_numpy(content.view(dtype).reshape(weight.shape))


def _keep_graph(options: onnxruntime.SessionOptions, path: Path) -> None:
    """Let a session write the graph it runs; its weights, which may be many GB, go nowhere."""
    nowhere = path.with_suffix(".weights")
    if not nowhere.is_symlink():
        nowhere.symlink_to(os.devnull)
    options.optimized_model_filepath = str(path)
    options.add_session_config_entry("session.optimized_model_external_initializers_file_name", nowhere.name)


def _disabled(network: Network) -> list[str]:
    """Return the optimizations that a network goes without: a Gemm would hide its products from those for int8."""
    return [] if network.quantization is None else ["MatMulAddFusion"]


def _check_precision(bundle: Bundle, *, reference: bool) -> None:
    """Raise EngineError for what ONNX Runtime has no CPU kernels for, or none that multiply in 8 bits."""
    if "fp8" in bundle.manifest.multiplies_in and not reference:
        raise EngineError(
            f"{bundle.path} multiplies in fp8, which no CPU can: ONNX Runtime would compute in float32, more slowly",
            fix="export with --precision int8/fp32, or run it with --engine tensorrt-rtx or tensorrt",
        )
    if "bf16" in bundle.manifest.computes_in:
        raise EngineError(
            f"{bundle.path} computes in bf16, which ONNX Runtime has no CPU kernels for",
            fix="run it with --engine openvino, or export with --precision fp32, or int8/fp32",
        )


def _check_quantization(bundle: Bundle) -> None:
    """Raise EngineError for what CUDA has no kernels for: quantized layers in a network that computes in bf16."""
    networks = bundle.manifest.networks.items()
    for name, network in networks:
        if network.quantization is not None and network.precision == "bf16":
            raise EngineError(
                f"{name} of {bundle.path} is quantized and computes in bf16: ONNX Runtime has no CUDA kernels for it",
                fix=f"export with --precision {network.quantization.scheme}/fp16, or run it with --engine tensorrt",
            )


class _Memory:
    """Where the tensors of a backend lie, and what computes there.

    Attributes:
        kind: cpu or cuda, as ONNX Runtime calls it.
        number: Of the device.
    """

    def __init__(self, device: int | None) -> None:
        self.on_gpu = device is not None
        self.kind, self.number = ("cpu", 0) if device is None else ("cuda", device)

    @property
    def providers(self) -> list[Any]:
        """What a session is to run on, as ``InferenceSession`` takes it."""
        if not self.on_gpu:
            return ["CPUExecutionProvider"]
        options = {
            "device_id": str(self.number),
            # The default doubles what it asks for, and could take 16 GB for 11 GB of weights.
            "arena_extend_strategy": "kSameAsRequested",
            # cuDNN's own recommendation; the default searches, for long and with much memory, in every session anew.
            "cudnn_conv_algo_search": "HEURISTIC",
            "use_tf32": "0",  # so that fp32 is fp32 in matrix products, as in PyTorch
        }
        return [(_CUDA, options)]

    def hold(self, tensor: Any) -> onnxruntime.OrtValue:
        """Return a tensor that lies here; one that a run put out does so already."""
        if isinstance(tensor, onnxruntime.OrtValue):
            return tensor
        if tensor.dtype.name == "bfloat16":  # lies on the host, and is copied by the run that takes it
            return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(tensor.view(np.uint16), _BFLOAT16)
        return onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(tensor), self.kind, self.number)


_PACKAGE = "pip uninstall -y onnxruntime; pip install --force-reinstall --no-deps onnxruntime-gpu"
_LIBRARIES = f"{pip_install('gpu')}, and see what nvidia-smi says"
_SMALLER = (
    "end what else uses the GPU, run with --vae-tiling, or export with a precision of fewer bytes or at a smaller shape"
)


def check_cuda_package() -> None:
    """Make sure that the onnxruntime that is installed is one with CUDA.

    Raises:
        EngineError: It is too old, or the one for CPUs, which takes the place of the other when both are installed.
    """
    if _CUDA not in onnxruntime.get_available_providers():
        raise EngineError(f"the onnxruntime {onnxruntime.__version__} installed here has no CUDA", fix=_PACKAGE)
    if not hasattr(onnxruntime.InferenceSession, "get_provider_graph_assignment_info"):
        raise EngineError(f"onnxruntime-gpu {onnxruntime.__version__} is too old", fix=_LIBRARIES)


def check_device(device: int) -> None:
    """Make sure, by one small copy, that ONNX Runtime can use a GPU; a session would be made without it and not say."""
    check_cuda_package()
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        onnxruntime.preload_dlls()  # finds the CUDA libraries that pip installed, and prints which it misses
    try:
        onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros(1, np.float32), "cuda", device)
    except _ERRORS as error:
        missing = said.getvalue().splitlines()
        reason = missing[0] if missing else _first_line(error)
        raise EngineError(f"ONNX Runtime cannot use GPU {device}: {reason}", fix=_LIBRARIES) from error


def _fail(what: str, error: Exception, *, fix: str, on_gpu: bool = True) -> NoReturn:
    """State what ONNX Runtime raised, with the first line of its reason."""
    smaller = _SMALLER if on_gpu else _SMALLER.replace("uses the GPU", "takes memory")
    if _OUT_OF_MEMORY.search(str(error)):
        raise OutOfMemoryError(f"{what}, out of memory: {_first_line(error)}", fix=smaller) from error
    raise EngineError(f"{what}: {_first_line(error)}", fix=_remedy(error, fix)) from error


def _remedy(error: Exception, fix: str) -> str:
    """Return what helps: nothing that is exported again where a device or ONNX Runtime itself failed."""
    if _DEVICE.search(str(error)):
        return _LIBRARIES
    return "report this with the model's name, and what cvx-deploy doctor says" if type(error) is RuntimeError else fix


def _first_line(error: Exception) -> str:
    """Return the first line of a reason, without the place in ONNX Runtime's sources that it may begin with."""
    line = (str(error).strip().splitlines() or ["it did not say why"])[0]
    return safe(re.sub(r"^\S+\.(?:cc|cu|h):\d+ .*?\) (?=[A-Z])", "", line), 300)
