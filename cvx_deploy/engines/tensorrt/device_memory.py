"""What lies on the device and in pinned memory: who owns it, how much it is, and whether a tensor's values still stand.

Every byte that a backend allocates itself goes through one `DeviceMemory`, which can give all of it back.
"""

import ctypes
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cvx_deploy.engines.cuda import Cuda
from cvx_deploy.errors import EngineError


@dataclass(eq=False)
class Buffer:
    """A piece of device memory.

    Attributes:
        version: How often it was written; a tensor of an earlier version is gone.
    """

    address: int
    nbytes: int
    version: int = 0


@dataclass(frozen=True)
class DeviceTensor:
    """The output of a run, where the run left it.

    Attributes:
        version: What the buffer's version was when these values were written.
        event: Reached when they are.
    """

    buffer: Buffer
    version: int
    shape: tuple[int, ...]
    dtype: "np.dtype[Any]"
    event: int

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return tensor_bytes(self.shape, self.dtype)

    def check(self) -> None:
        """Raise EngineError when another run has written over it, or it was freed."""
        if self.version != self.buffer.version:
            raise EngineError(
                f"a tensor of shape {self.shape} is used after another run wrote over it",
                fix="bring it to the host before its network runs again",
            )


@dataclass(frozen=True, eq=False)
class Constant:
    """Values that do not change, which each network brings to the device once, however many runs take them."""

    array: NDArray[Any]


def tensor_bytes(shape: tuple[int, ...], dtype: "np.dtype[Any]") -> int:
    """Return the bytes of a dense tensor."""
    return int(np.prod(shape, dtype=np.int64)) * dtype.itemsize


class DeviceMemory:
    """The buffers of one device.

    Attributes:
        in_use: Bytes allocated now; `peak` is the most there ever were.
    """

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        self._buffers: set[Buffer] = set()
        self._shared: dict[Hashable, tuple[Buffer, list[object]]] = {}
        self.in_use = self.peak = 0

    def allocate(self, nbytes: int) -> Buffer:
        """Return a new buffer; OutOfMemoryError when there is no room for it."""
        buffer = Buffer(self._cuda.malloc(nbytes), nbytes)
        self._buffers.add(buffer)
        self.in_use += nbytes
        self.peak = max(self.peak, self.in_use)
        return buffer

    def free(self, buffer: Buffer) -> None:
        """Free a buffer, which nothing queued may still need; tensors in it are gone."""
        self._buffers.remove(buffer)
        self.in_use -= buffer.nbytes
        buffer.version += 1
        self._cuda.free(buffer.address)

    def share(self, key: Hashable, nbytes: int, user: object) -> Buffer:
        """Return the buffer of a key, allocated for the first of its users and freed after the last."""
        if key not in self._shared:
            self._shared[key] = (self.allocate(nbytes), [])
        buffer, users = self._shared[key]
        users.append(user)
        return buffer

    def unshare(self, user: object) -> None:
        """Take a user off every shared buffer."""
        for key, (buffer, users) in list(self._shared.items()):
            if user in users:
                users.remove(user)
                if not users:
                    del self._shared[key]
                    self.free(buffer)

    def shared_bytes(self, keys: dict[Hashable, int]) -> int:
        """Return the bytes that sharing `keys`, key to bytes, would add."""
        return sum(nbytes for key, nbytes in keys.items() if key not in self._shared)


class Pinned:
    """Pinned host memory, and an event which tells when a copy no longer needs it."""

    def __init__(self, cuda: Cuda, nbytes: int) -> None:
        self._cuda = cuda
        self.address = cuda.malloc_host(nbytes)
        self.nbytes = nbytes
        try:
            self.event = cuda.create_event()
        except BaseException:
            cuda.free_host(self.address)
            raise

    def view(self, shape: tuple[int, ...], dtype: "np.dtype[Any]") -> NDArray[Any]:
        """Return its first bytes as an array, which is not a copy."""
        size = tensor_bytes(shape, dtype)
        memory = (ctypes.c_uint8 * size).from_address(self.address)
        return np.ctypeslib.as_array(memory).view(dtype).reshape(shape)

    def free(self) -> None:
        """Free it, which nothing queued may still need."""
        self._cuda.destroy_event(self.event)
        self._cuda.free_host(self.address)


class Upload:
    """An input's own place on the device, and the pinned memory its values go through."""

    def __init__(self, cuda: Cuda, memory: DeviceMemory, shape: tuple[int, ...], dtype: "np.dtype[Any]") -> None:
        self._cuda, self._memory = cuda, memory
        self._shape, self._dtype = shape, dtype
        self._held: Constant | None = None
        nbytes = tensor_bytes(shape, dtype)
        self.buffer = memory.allocate(nbytes)
        try:
            self._pinned = Pinned(cuda, nbytes)
        except BaseException:
            memory.free(self.buffer)
            raise

    def put(self, values: NDArray[Any] | Constant, stream: int) -> None:
        """Queue the copy of values to the device; of a constant that is there already, none."""
        constant = values if isinstance(values, Constant) else None
        if constant is not None and constant is self._held:
            return
        self._cuda.synchronize_event(self._pinned.event)  # the last copy may still read the pinned memory
        self._pinned.view(self._shape, self._dtype)[...] = values.array if isinstance(values, Constant) else values
        self._cuda.copy_to_device(self.buffer.address, self._pinned.address, self.buffer.nbytes, stream)
        self._cuda.record(self._pinned.event, stream)
        self._held = constant

    def free(self) -> None:
        """Free both, which nothing queued may still need."""
        self._pinned.free()
        self._memory.free(self.buffer)


class Download:
    """The way of outputs to the host: on a stream of its own, so that the next run need not wait for it."""

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        self._stream = cuda.create_stream()
        self._pinned: Pinned | None = None

    def fetch(self, tensor: DeviceTensor) -> NDArray[Any]:
        """Wait until a tensor is written, and return a copy of its values."""
        tensor.check()
        pinned = self._room(tensor.nbytes)
        self._cuda.wait(self._stream, tensor.event)
        self._cuda.copy_to_host(pinned.address, tensor.buffer.address, tensor.nbytes, self._stream)
        self._cuda.synchronize(self._stream)
        return pinned.view(tensor.shape, tensor.dtype).copy()

    def _room(self, nbytes: int) -> Pinned:
        if self._pinned is None or self._pinned.nbytes < nbytes:
            if self._pinned is not None:
                self._pinned.free()
                self._pinned = None
            self._pinned = Pinned(self._cuda, nbytes)
        return self._pinned

    def free(self) -> None:
        """Let go of the stream and the memory."""
        if self._pinned is not None:
            self._pinned.free()
            self._pinned = None
        self._cuda.destroy_stream(self._stream)


class Activations:
    """The one block that all networks compute in: they run one after another, on one stream."""

    def __init__(self, memory: DeviceMemory) -> None:
        self._memory = memory
        self._buffer: Buffer | None = None

    @property
    def nbytes(self) -> int:
        """How large it is now."""
        return self._buffer.nbytes if self._buffer is not None else 0

    @property
    def address(self) -> int:
        """Where it is now."""
        return self._buffer.address if self._buffer is not None else 0

    def grow(self, nbytes: int) -> None:
        """Replace it by one of `nbytes`; the old one, which nothing queued may still need, is freed first."""
        self.free()
        if nbytes:
            self._buffer = self._memory.allocate(nbytes)

    def free(self) -> None:
        """Free it, which nothing queued may still need."""
        if self._buffer is not None:
            buffer, self._buffer = self._buffer, None
            self._memory.free(buffer)
