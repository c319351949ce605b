"""A TensorRT library whose engines compute with ONNX Runtime, in the memory of a `FakeCuda`.

An engine file says which network it is and how much memory it takes; the rest of it is padding.
"""

import enum
import json
import threading
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from cvx_deploy.bundle.opened import Bundle
from cvx_deploy.engines.onnxruntime.backend import OrtBackend
from cvx_deploy.engines.tensorrt.libraries import EngineKind, Library
from cvx_deploy.errors import OutOfMemoryError
from tests.engines.fake_cuda import Allocation, FakeCuda, MisuseError, Operation, Region

_HEADER = 512
_PIECE = 300  # the library asks for odd amounts


@dataclass(frozen=True)
class EngineFacts:
    """What an engine file says.

    Attributes:
        sizes: Of the symbols that are fixed when it is built.
        weights: Bytes, of which `streamable` may stay on the host.
        modules: Bytes that its kernels take beside them, which the library does not tell.
        activations: Bytes, and `scratch` more when weights are streamed.
    """

    role: str
    sizes: dict[str, int]
    weights: int = 4_000
    modules: int = 0
    streamable: int = 0
    activations: int = 3_000
    scratch: int = 500

    def write(self, path: Path) -> None:
        """Write the engine file."""
        path.write_bytes(json.dumps(asdict(self)).encode().ljust(_HEADER) + bytes(self.weights))


class FakeStore:
    """Engines made when they are asked for; `facts` changes what they say by role."""

    def __init__(self, folder: Path, **facts: dict[str, int]) -> None:
        self._folder, self._facts = folder, facts

    def find(self, kind: EngineKind, role: str, sizes: Mapping[str, int], library: str, platform: Any) -> Any:
        return role, {symbol: size for symbol, size in sizes.items() if symbol != "batch"}

    def path(self, record: Any) -> Path:
        role, sizes = record
        path = self._folder / f"{role}{''.join(f'-{size}' for size in sizes.values())}.engine"
        if not path.exists():
            whole = path.with_suffix(f".{threading.get_ident()}")  # two devices load at the same time
            EngineFacts(role, sizes, **self._facts.get(role, {})).write(whole)
            whole.replace(path)
        return path


class _Severity(enum.Enum):
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)


class _Logger:
    ERROR, INTERNAL_ERROR = _Severity.ERROR, _Severity.INTERNAL_ERROR


class _Reader:
    pass


class _SeekPosition(enum.Enum):
    SET, CUR, END = range(3)


class _Strategy(enum.Enum):
    STATIC, ON_PROFILE_CHANGE, USER_MANAGED = range(3)


class _Specialization(enum.Enum):
    LAZY, EAGER, NONE = range(3)


class _Stat(enum.Enum):
    TOTAL_WEIGHTS_SIZE = 0


class _Capability(enum.IntEnum):
    CURRENT = 1
    SM89 = 89
    SM120 = 120


class _Runtime:
    def __init__(self, cuda: FakeCuda, networks: "Networks", logger: Any) -> None:
        self._cuda, self._networks, self._logger = cuda, networks, logger

    def deserialize_cuda_engine(self, reader: Any) -> "_Engine | None":
        header = reader.read(_HEADER, 0)
        try:
            facts = EngineFacts(**json.loads(header))
        except (ValueError, TypeError):
            self._logger.log(_Severity.ERROR, "the plan's magic number is wrong")
            return None
        assert reader.seek(0, _SeekPosition.SET)
        left = _HEADER + facts.weights
        while left:
            piece = reader.read(min(_PIECE, left), 0)
            if not piece:
                self._logger.log(_Severity.ERROR, "the plan ends too early")
                return None
            left -= len(piece)
        try:
            return _Engine(self._cuda, self._networks, self._logger, facts)
        except OutOfMemoryError:
            self._logger.log(_Severity.ERROR, "Requested amount of GPU memory: OutOfMemory")
            return None


class Networks:
    """What the engines of a bundle compute: its networks in ONNX Runtime, by role and sizes."""

    def __init__(self, bundle: Bundle) -> None:
        self._backend, self._stack = OrtBackend(bundle), ExitStack()
        self._sessions: dict[str, Any] = {}
        self._loading = threading.Lock()
        self.bundle = bundle

    def run(self, role: str, sizes: dict[str, int], inputs: dict[str, Any]) -> dict[str, Any]:
        key = f"{role} {sizes}"
        with self._loading:  # several devices compute with the same sessions
            if key not in self._sessions:
                self._sessions[key] = self._stack.enter_context(self._backend.load(role, sizes))
        outputs = self._sessions[key].run(inputs)
        return {name: self._backend.to_host(tensor) for name, tensor in outputs.items()}


class _Engine:
    def __init__(self, cuda: FakeCuda, networks: Networks, logger: Any, facts: EngineFacts) -> None:
        self.facts, self.cuda, self.logger, self.networks = facts, cuda, logger, networks
        self.described = networks.bundle.network(facts.role)
        self.contexts = 0
        self._budget: int | None = None
        self._weights: list[int] = []
        self._modules = [cuda.malloc(facts.modules, f"kernels of {facts.role}")] if facts.modules else []
        self._hold(facts.weights - facts.streamable)
        self.streamable_weights_size = facts.streamable
        self._tensors = [*self.described.inputs, *self.described.outputs]
        self.num_io_tensors = len(self._tensors)
        cuda.engines += 1

    def _hold(self, nbytes: int) -> None:
        if nbytes:
            self._weights.append(self.cuda.malloc(nbytes, f"weights of {self.facts.role}"))

    def __del__(self) -> None:
        if not hasattr(self, "num_io_tensors"):
            return
        if self.contexts:
            self.cuda.violations.append(f"the engine of {self.facts.role} went before its context")
        if not self.cuda.lost:
            for address in self._weights + self._modules:
                self.cuda.free(address)
        self.cuda.engines -= 1

    def get_engine_stat(self, stat: _Stat) -> int:
        return self.facts.weights

    @property
    def weight_streaming_budget_v2(self) -> int:
        return self._budget or 0

    @weight_streaming_budget_v2.setter
    def weight_streaming_budget_v2(self, budget: int) -> None:
        if self.contexts or not 0 <= budget <= self.facts.streamable:
            raise MisuseError(f"a streaming budget of {budget} with {self.contexts} contexts")
        self._budget = budget
        self.cuda.log.append(("budget", self.facts.role, budget))

    @property
    def device_memory_size_v2(self) -> int:
        streams = self._budget is not None and self._budget < self.facts.streamable
        return self.facts.activations + (self.facts.scratch if streams else 0)

    def get_tensor_name(self, index: int) -> str:
        return self._tensors[index].name

    def get_tensor_dtype(self, name: str) -> Any:
        return np.dtype(next(spec.dtype for spec in self._tensors if spec.name == name))

    def create_runtime_config(self) -> "_Config":
        return _Config(self.cuda)

    def create_execution_context(self, how: Any) -> "Context":
        if (how.strategy if isinstance(how, _Config) else how) is not _Strategy.USER_MANAGED:
            raise MisuseError("a context allocates for itself")
        if self.facts.streamable and self._budget is None:
            raise MisuseError("the streaming budget was never set")
        if self._budget and len(self._weights) == (self.facts.weights > self.facts.streamable):
            self._hold(self._budget)
        if isinstance(how, _Config) and how.cache is not None:
            how.cache.add(self.facts.role)
        return Context(self)

    @property
    def memory(self) -> tuple[Allocation, ...]:
        return tuple(self.cuda.region(address, 1).allocation for address in self._weights)


class _Config:
    def __init__(self, cuda: FakeCuda) -> None:
        self._cuda = cuda
        self.strategy = _Strategy.STATIC
        self.cache: Cache | None = None
        self.dynamic_shapes_kernel_specialization_strategy = _Specialization.LAZY

    def set_execution_context_allocation_strategy(self, strategy: _Strategy) -> None:
        self.strategy = strategy

    def create_runtime_cache(self) -> "Cache":
        return Cache(self._cuda)

    def set_runtime_cache(self, cache: "Cache") -> bool:
        self.cache = cache
        return True


class Cache:
    """The kernels that are compiled, by name; one that was read again is not compiled."""

    compiled: list[str] = []  # noqa: RUF012  # of all caches, for the tests

    def __init__(self, cuda: FakeCuda) -> None:
        self._kernels: list[str] = []
        self._cuda = cuda

    def add(self, kernel: str) -> None:
        if kernel not in self._kernels:
            self._kernels.append(kernel)
            self.compiled.append(kernel)

    def serialize(self) -> bytes | None:
        return None if self._cuda.lost else json.dumps(self._kernels).encode()

    def deserialize(self, blob: bytes) -> bool:
        try:
            self._kernels = json.loads(blob)
        except ValueError:
            return False
        return True


class _Alive:
    """Whether a context is still there, as what is queued sees it."""

    yes = True


class Context:
    """An execution context, whose runs ONNX Runtime computes."""

    def __init__(self, engine: _Engine) -> None:
        self._engine, self._alive = engine, _Alive()
        self._specs = {spec.name: spec for spec in engine.described.inputs}
        self._sizes = dict(engine.facts.sizes)
        self._addresses: dict[str, int] = {}
        self._block = (0, 0)
        self._warm = False
        engine.contexts += 1

    def __del__(self) -> None:
        self._alive.yes = False
        self._engine.contexts -= 1

    def _refuse(self, why: str) -> bool:
        self._engine.logger.log(_Severity.ERROR, why)
        return False

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        for size, given in zip(self._specs[name].shape, shape, strict=True):
            if size == "batch":
                self._sizes["batch"] = given
        return self._specs[name].resolve(self._sizes) == tuple(shape) and self._sizes.get("batch", 1) <= 2

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        specs = (*self._engine.described.inputs, *self._engine.described.outputs)
        return next(spec for spec in specs if spec.name == name).resolve(self._sizes)

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._engine.cuda.check_address(address, name)
        self._addresses[name] = address
        self._engine.cuda.log.append(("bind", self._engine.facts.role, name, address))
        return True

    def set_device_memory(self, address: int, nbytes: int) -> None:
        if nbytes:
            self._engine.cuda.check_address(address, f"the activation block of {self._engine.facts.role}")
        self._block = (address, nbytes)

    def execute_async_v3(self, stream: int) -> bool:
        cuda, role = self._engine.cuda, self._engine.facts.role
        needed = self._engine.device_memory_size_v2
        if cuda.lost:
            return self._refuse("Cuda Runtime (an illegal memory access was encountered)")
        if self._block[1] < needed:
            return self._refuse(f"{self._block[1]} bytes of device memory, {needed} are needed")
        if cuda.capturing and not self._warm:
            cuda.capture_broken = True
            return self._refuse("the first run cannot be captured")
        try:
            inputs, outputs = (
                self._regions(self._engine.described.inputs),
                self._regions(self._engine.described.outputs),
            )
        except KeyError as error:
            return self._refuse(f"the address of {error} is not set")
        block = cuda.region(self._block[0], needed)
        self._warm = True
        if not cuda.capturing:
            cuda.log.append(("enqueue", role))
        regions = (block, *inputs.values(), *outputs.values())
        needs = (*(region.allocation for region in regions), *self._engine.memory)
        cuda.kernel(stream, Operation(role, self._work(block, inputs, outputs), needs))
        return True

    def _regions(self, specs: Any) -> dict[str, Region]:
        found = {}
        for spec in specs:
            nbytes = int(np.prod(spec.resolve(self._sizes))) * np.dtype(spec.dtype).itemsize
            found[spec.name] = self._engine.cuda.region(self._addresses[spec.name], nbytes)
        return found

    def _work(self, block: Region, inputs: dict[str, Region], outputs: dict[str, Region]) -> Any:
        alive, facts, networks = self._alive, self._engine.facts, self._engine.networks
        sizes, cuda = dict(self._sizes), self._engine.cuda
        described = self._engine.described

        def work() -> None:
            if not alive.yes:
                raise MisuseError(f"{facts.role} runs after its context is gone")
            cuda.log.append(("run", facts.role))
            arrays = {
                spec.name: np.frombuffer(inputs[spec.name].read(), spec.dtype).reshape(spec.resolve(sizes))
                for spec in described.inputs
            }
            block.write(bytes([0xAB]) * block.nbytes)  # what another network kept there is gone
            for name, array in networks.run(facts.role, sizes, arrays).items():
                outputs[name].write(np.ascontiguousarray(array).tobytes())

        return work


def fake_library(cuda: FakeCuda, networks: Networks, kind: EngineKind = "tensorrt-rtx") -> Library:
    """Return a library whose engines compute a bundle's networks on a fake driver."""
    module: Any = ModuleType("fake_tensorrt")
    module.ILogger, module.IStreamReaderV2, module.SeekPosition = _Logger, _Reader, _SeekPosition
    module.ComputeCapability = _Capability
    module.ExecutionContextAllocationStrategy, module.EngineStat = _Strategy, _Stat
    module.DynamicShapesKernelSpecializationStrategy = _Specialization
    module.Runtime = lambda logger: _Runtime(cuda, networks, logger)
    return Library(kind, module, "1.2.3")


def compiled_kernels() -> list[str]:
    """Return the list that every kernel compiled from now on is added to."""
    Cache.compiled = []
    return Cache.compiled
