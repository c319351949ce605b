"""TensorRT engines from files: read as a stream, with a weight streaming budget and a cache of compiled kernels."""

from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from cvx_deploy.engines.tensorrt.libraries import Library
from cvx_deploy.errors import CvxError, EngineError, OutOfMemoryError
from cvx_deploy.files import staged_file

_CHUNK = 64 * 2**20  # the library asks for all weights at once; read in pieces, they never lie in host memory whole
_KEPT_MESSAGES = 5


class EngineLoader:
    """Deserializes engines with one of the two libraries.

    Args:
        gpu: What tells this kind of GPU from others in the name of a kernel cache, such as sm89.
        note: Told when compiled kernels cannot be kept.

    Raises:
        EngineError: The library does not run on such a GPU, or finds no driver it can work with.
    """

    def __init__(self, library: Library, gpu: str, note: Callable[[str], None]) -> None:
        library.check_runs_on(gpu)
        self._library, self._gpu, self._note = library, gpu, note
        self._errors: deque[str] = deque(maxlen=_KEPT_MESSAGES)
        self._logger = _logger(library.module, self._errors)
        try:
            self._runtime = library.module.Runtime(self._logger)
        except RuntimeError as error:
            raise self.failure("cannot start", str(error)) from error

    def load(self, path: Path, role: str) -> "Engine":
        """Return the engine in a file, ready to run.

        Raises:
            OutOfMemoryError: Its weights do not fit into the device's memory.
            EngineError: The library cannot use it, or the file cannot be read.
        """
        native = self.deserialize(path, role)
        return Engine(self._library, native, self._cache_path(path), self._note, self.failure)

    def deserialize(self, path: Path, role: str) -> Any:
        """Return the library's ``ICudaEngine`` of a file; it fails as `load` does."""
        self._errors.clear()
        problem = f"cannot load {role} from {path}"
        try:
            with path.open("rb") as file:
                native = self._runtime.deserialize_cuda_engine(_reader(self._library.module, file))
        except RuntimeError as error:
            raise self.failure(problem, str(error)) from error
        except OSError as error:
            raise EngineError(f"cannot read {path}: {error.strerror}", fix="check the file and its disk") from error
        if native is None:
            raise self.failure(problem)
        return native

    def refitter(self, native: Any) -> Any:
        """Return what exchanges the weights of an engine that `deserialize` returned."""
        return self._library.module.Refitter(native, self._logger)

    def _cache_path(self, path: Path) -> Path | None:
        """Return where the kernels that TensorRT for RTX compiles on this GPU are kept; the full library does not."""
        if self._library.kind != "tensorrt-rtx":
            return None
        return path.with_name(f"{path.stem}.{self._gpu}.kernels")

    def failure(self, problem: str, reason: str = "") -> EngineError:
        """Return the error for what the library refused, in its own words."""
        messages = [*self._errors, *([reason] if reason else [])]
        said = f": {messages[-1].strip().splitlines()[0]}" if messages else ""
        what = f"{self._library.kind} {problem}{said}"
        if any("out of memory" in message.lower() or "outofmemory" in message.lower() for message in messages):
            return OutOfMemoryError(what, fix="end what else uses the GPU, or run with --vram")
        if any("driver" in message.lower() for message in messages):
            return EngineError(what, fix="run it where an NVIDIA driver is, new enough for the library; see nvidia-smi")
        return EngineError(what, fix="build the engine again; run: cvx-deploy build --help")

    def close(self) -> None:
        """Let go of the library's runtime, after all engines."""
        self._runtime = None


class Engine:
    """One deserialized engine.

    Attributes:
        weights: Bytes of its weights.
        streamable: How many of them may stay in host memory; 0 unless it was built for that.
        on_device: How many of them lie on the device.
    """

    def __init__(
        self,
        library: Library,
        native: Any,
        cache_path: Path | None,
        note: Callable[[str], None],
        failure: Callable[..., EngineError],
    ) -> None:
        api = library.module
        self._native, self._note, self._failure = native, note, failure
        self._strategy = api.ExecutionContextAllocationStrategy.USER_MANAGED
        self.weights = int(native.get_engine_stat(api.EngineStat.TOTAL_WEIGHTS_SIZE))
        self.streamable = int(native.streamable_weights_size)
        self.on_device = self.weights
        self._config: Any = None
        self._cache: Any = None
        self._cache_path, self._cached = cache_path, b""
        if cache_path is not None:
            self._configure(api, cache_path)

    def _configure(self, api: Any, cache_path: Path) -> None:
        config = self._native.create_runtime_config()
        config.set_execution_context_allocation_strategy(self._strategy)
        # Sizes are fixed while a network is loaded, and kernels that are still to come would not be in a CUDA graph.
        eager = api.DynamicShapesKernelSpecializationStrategy.EAGER
        config.dynamic_shapes_kernel_specialization_strategy = eager
        self._cache = config.create_runtime_cache()
        if cache_path.is_file():
            self._cached = cache_path.read_bytes()
            self._cache.deserialize(self._cached)  # refused where it is another GPU's or version's: compiled anew
        config.set_runtime_cache(self._cache)
        self._config = config

    @property
    def activations(self) -> int:
        """Bytes a run needs besides in- and outputs and weights; they depend on the streaming budget."""
        return int(self._native.device_memory_size_v2)

    @property
    def tensors(self) -> set[str]:
        """The names of its in- and outputs."""
        return {self._native.get_tensor_name(index) for index in range(self._native.num_io_tensors)}

    def bytes_per_element(self, name: str) -> int:
        """Return the size of an element of an in- or output."""
        return int(self._native.get_tensor_dtype(name).itemsize)

    def stream_weights(self, budget: int) -> None:
        """Keep at most `budget` bytes of the streamable weights on the device; only while it has no context."""
        if self.streamable:
            budget = min(budget, self.streamable)
            self._native.weight_streaming_budget_v2 = budget
            self.on_device = self.weights - self.streamable + budget

    def create_context(self) -> Any:
        """Return an execution context without activation memory of its own."""
        context = self._native.create_execution_context(self._strategy if self._config is None else self._config)
        if context is None:
            raise self._failure("cannot create an execution context")
        return context

    def close(self) -> None:
        """Keep the kernels that were compiled, and free the weights; its contexts must be gone."""
        self._keep_cache()
        self._cache = self._config = self._native = None

    def _keep_cache(self) -> None:
        if self._cache is None or self._cache_path is None:
            return
        serialized = self._cache.serialize()  # None where it cannot, on a device that failed for example
        kernels = b"" if serialized is None else bytes(serialized)
        if not kernels or kernels == self._cached:
            return
        try:
            with staged_file(self._cache_path) as staging:
                staging.write_bytes(kernels)
        except (CvxError, OSError) as error:
            self._note(f"note: the compiled kernels cannot be kept for the next run: {error}")


def _logger(api: Any, errors: deque[str]) -> Any:
    """Return a logger that keeps the last errors, for the message of what they lead to."""

    class Errors(api.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            api.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in (api.ILogger.ERROR, api.ILogger.INTERNAL_ERROR):
                errors.append(message)

    return Errors()


def _reader(api: Any, file: BinaryIO) -> Any:
    """Return a stream reader of an open file."""

    class Reader(api.IStreamReaderV2):  # type: ignore[misc]
        def __init__(self) -> None:
            api.IStreamReaderV2.__init__(self)

        def read(self, num_bytes: int, stream: int) -> bytes:
            return file.read(min(num_bytes, _CHUNK))

        def seek(self, offset: int, where: Any) -> bool:
            origins = {api.SeekPosition.SET: 0, api.SeekPosition.CUR: 1, api.SeekPosition.END: 2}
            file.seek(offset, origins[where])
            return True

    return Reader()
