"""The TensorRT backend: engines of either library on one GPU, with device memory through CUDA and no torch.

Everything runs on one stream. What was loaded stays loaded, with its CUDA graphs, until the backend is closed; within a
limit of device memory, the networks of one phase (text encoder, transformer, VAE) make room for those of the next; see
`engines.residency`.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from cvx_deploy.bundle.opened import Bundle
from cvx_deploy.engines.cuda import Cuda
from cvx_deploy.engines.residency import Policy, Residency, key_of
from cvx_deploy.engines.tensorrt.device_memory import Activations, Constant, DeviceMemory, DeviceTensor, Download
from cvx_deploy.engines.tensorrt.engine import Engine, EngineLoader
from cvx_deploy.engines.tensorrt.libraries import Library
from cvx_deploy.engines.tensorrt.session import Device, Layout, TrtSession
from cvx_deploy.engines.tensorrt.store import EngineRecord, EngineStore, Platform
from cvx_deploy.errors import EngineError, OutOfMemoryError
from cvx_deploy.progress import Progress, SilentProgress


class TensorRtBackend:
    """Runs a bundle's engines on one GPU; see `engines.backend.Backend`.

    It holds device memory until it is closed: use it in a ``with`` block.

    Args:
        bundle: What to run.
        library: Which of the two libraries runs it.
        cuda: The driver.
        store: Where the bundle's engines are.
        device: Which GPU.
        cuda_graphs: Whether runs that come again are launched as one graph.
        vram: Bytes of device memory that may be used; None for all there are.
        residency: Which networks stay loaded; within `vram` those of one phase.
        progress: Told what is worth knowing.

    Raises:
        EngineError: There is no such GPU, or the library cannot work here.
    """

    def __init__(
        self,
        bundle: Bundle,
        library: Library,
        cuda: Cuda,
        store: EngineStore,
        *,
        device: int = 0,
        cuda_graphs: bool = True,
        vram: int | None = None,
        residency: Policy = "resident",
        progress: Progress | None = None,
    ) -> None:
        self.bundle = bundle
        self._library, self._cuda, self._store = library, cuda, store
        self._number, self._graphs, self._vram = device, cuda_graphs, vram
        self._progress = progress or SilentProgress()
        gpu = cuda.gpu(device)
        self._platform = Platform.of(gpu)
        cuda.use(device)
        self._loader = EngineLoader(library, gpu.compute_capability, self._progress.note)
        self._memory = DeviceMemory(cuda)
        self._block = Activations(self._memory)
        self._engines: dict[Path, Engine] = {}
        policy: Policy = residency if vram is None else "phase"
        self._residency: Residency[TrtSession] = Residency(policy, self._progress, self._free)
        self._noted = False
        with ExitStack() as stack:
            self._stream = cuda.create_stream()
            stack.callback(cuda.destroy_stream, self._stream)
            self._download = Download(cuda)
            stack.callback(self._download.free)
            stack.callback(self._free_networks)
            self._stack = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # A device that failed fails in every call: what it failed with first is what there is to say.
        with suppress(EngineError) if error is not None else nullcontext():
            self.close()

    @contextmanager
    def load(self, role: str, sizes: Mapping[str, int]) -> Iterator[TrtSession]:
        """Give a network for the block; see `Backend.load`."""
        self._cuda.use(self._number)
        with self._residency.hold(role, key_of(role, sizes), partial(self._loaded, role, dict(sizes))) as session:
            session.open += 1
            try:
                yield session
            finally:
                session.open -= 1

    def require(self, needed: Iterable[tuple[str, Mapping[str, int]]]) -> None:
        """Raise EngineError unless there is a whole engine for every role at its sizes; none is loaded."""
        for role, sizes in needed:
            self._store.path(self._found(role, sizes))

    def to_device(self, array: NDArray[Any]) -> Constant:
        """See `Backend.to_device`; each network that takes it copies it to the device once."""
        return Constant(np.array(array))

    def to_host(self, tensor: DeviceTensor | Constant) -> NDArray[Any]:
        """Return a copy of a tensor's values, while runs that were queued after it go on."""
        if isinstance(tensor, Constant):
            return tensor.array.copy()
        self._cuda.use(self._number)
        return self._download.fetch(tensor)

    def close(self) -> None:
        """Free everything."""
        self._cuda.use(self._number)
        self._stack.close()

    def _found(self, role: str, sizes: Mapping[str, int]) -> EngineRecord:
        return self._store.find(self._library.kind, role, sizes, self._library.version, self._platform)

    def _loaded(self, role: str, sizes: dict[str, int]) -> TrtSession:
        described = self.bundle.network(role)
        path = self._store.path(self._found(role, sizes))
        self._evict(path)
        with ExitStack() as stack:
            engine = self._engine(path, role)
            if path not in self._engines:
                stack.callback(engine.close)
            self._make_room(engine, role, Layout(described, sizes))
            with self._stating(role, engine):
                session = TrtSession(
                    Device(self._cuda, self._number, self._stream, self._memory, self._block),
                    engine,
                    role,
                    sizes,
                    described,
                    graphs=self._graphs,
                    refused=self._note_refusal,
                    failure=self._loader.failure,
                )
                stack.callback(session.close)
                self._give_block(session)
            stack.pop_all()
        self._engines[path] = engine
        return session

    def _engine(self, path: Path, role: str) -> Engine:
        if path in self._engines:
            return self._engines[path]
        with self._stating(role):
            return self._loader.load(path, role)

    def _give_block(self, session: TrtSession) -> None:
        """Let a network compute in the block that all share, made larger where it needs more."""
        needed, before = session.engine.activations, self._block.nbytes
        sessions = [*self._residency.sessions, session]
        if needed > before:
            self._cuda.synchronize(self._stream)
            for other in sessions:
                other.forget_graphs()
            try:
                self._block.grow(needed)
            except OutOfMemoryError:
                self._block.grow(before)
                raise
            finally:
                for other in self._residency.sessions:
                    other.use_block()
        session.use_block()

    def _evict(self, path: Path) -> None:
        """Within a limit, let go of as many networks as must go for an engine's file to fit."""
        if self._vram is not None and path not in self._engines:
            size = path.stat().st_size
            while self._room(0, 0) < size and (idle := self._residency.idle):
                self._residency.let_go(idle[0])

    def _free(self, session: TrtSession) -> None:
        """Free a network, and its engine where no other uses it."""
        self._cuda.synchronize(self._stream)
        session.close()
        used = {other.engine for other in self._residency.sessions}
        for path, engine in list(self._engines.items()):
            if engine not in used:
                del self._engines[path]
                engine.close()
        if not used:
            self._block.free()

    def _room(self, extra: int, activations: int) -> int:
        """Return what the limit leaves for weights beside the engines that are loaded and `extra` bytes."""
        assert self._vram is not None
        weights = sum(engine.on_device for engine in self._engines.values())
        tensors = self._memory.in_use - self._block.nbytes
        return self._vram - weights - tensors - extra - max(self._block.nbytes, activations)

    def _make_room(self, engine: Engine, role: str, layout: Layout) -> None:
        """Decide how much of an engine's weights lies on the device; within a limit, idle networks go first."""
        if engine in self._engines.values():
            weights = streamable = 0  # they are there already, and cannot be changed while a network runs with them
        else:
            weights, streamable = engine.weights - engine.streamable, engine.streamable
        if self._vram is None:
            engine.stream_weights(streamable)
            return
        if streamable:
            engine.stream_weights(0)  # streaming all needs the most memory for what is on its way
        while True:
            tensors = layout.own_bytes() + self._memory.shared_bytes(layout.shared())
            room = self._room(tensors + weights, engine.activations)
            idle = [session for session in self._residency.idle if session.engine is not engine]
            if room >= streamable or not idle:
                break
            self._residency.let_go(idle[0])
        if room < 0:
            raise _too_small(role, self._vram, room, weights, engine.activations, tensors)
        if streamable:
            engine.stream_weights(room)

    @contextmanager
    def _stating(self, role: str, *loading: Engine) -> Iterator[None]:
        """Say of an allocation that failed what else takes memory, and how the network would fit."""
        try:
            yield
        except OutOfMemoryError as error:
            free, total = self._cuda.memory_info()
            held = self._memory.in_use + sum(engine.on_device for engine in {*self._engines.values(), *loading})
            roles = sorted({session.role for session in self._residency.sessions})
            beside = f", beside {_size(held)} of {', '.join(roles)}" if roles else ""
            raise OutOfMemoryError(
                f"{role} does not fit into the GPU's memory{beside}: {_size(free)} of {_size(total)} are free",
                fix=self._remedy(free + held),
            ) from error

    def _remedy(self, available: int) -> str:
        if self._vram is not None and self._vram > available:
            return f"run with --vram {_size(available, down=True)}, which keeps the networks of one phase alone"
        return f"end what else uses the GPU, or {_SMALLER}"

    def _note_refusal(self, role: str) -> None:
        if not self._noted:
            self._noted = True
            self._progress.note(f"note: {role} cannot be captured as a CUDA graph, and is queued kernel by kernel")

    def _free_networks(self) -> None:
        with ExitStack() as stack:
            stack.callback(self._loader.close)
            stack.callback(self._block.free)
            stack.callback(self._residency.close)


_SMALLER = (
    "build the engine with --weight-streaming, export with a precision of fewer bytes or at a smaller shape, or for "
    "the VAE run with --vae-tiling"
)


def _too_small(role: str, vram: int, room: int, weights: int, activations: int, tensors: int) -> OutOfMemoryError:
    parts = f"weights {_size(weights)}, activations {_size(activations)}, in- and outputs {_size(tensors)}"
    return OutOfMemoryError(
        f"{role} needs {_size(vram - room)} of device memory ({parts}), and --vram allows {_size(vram)}",
        fix=f"run with --vram {_size(vram - room)} or more, or {_SMALLER}",
    )


def _size(nbytes: int, *, down: bool = False) -> str:
    """Return bytes as a person reads them, in the form that --vram takes, rounded up, or down."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if nbytes >= size:
            tenths = nbytes * 10 // size if down else -(-nbytes * 10 // size)
            return f"{tenths / 10:.1f}{unit}"
    return f"{nbytes}B"
