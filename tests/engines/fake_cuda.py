"""A CUDA driver without a GPU, which finds what a real one would punish or hide.

Memory is NumPy arrays by address. What is queued on a stream runs as late as the rules allow: when something waits for
it. So memory that is freed or overwritten too early is seen too late, as on a device. MisuseError is an AssertionError.

As with a real one, each thread has a current device, which what it allocates and queues must belong to; a capture
forbids its thread whatever may wait; and after a bad access of memory every call fails.
"""

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cvx_deploy.engines.cuda import Gpu
from cvx_deploy.errors import EngineError, OutOfMemoryError

_GARBAGE = 0xFF  # as float32 or float16 it is not a number
_ALIGNMENT = 256


class MisuseError(AssertionError):
    """What a backend must never do to a driver."""


@dataclass(frozen=True)
class Operation:
    """Something queued: what it does, and the allocations it needs to be there when it runs."""

    name: str
    work: Callable[[], None]
    needs: tuple["Allocation", ...] = ()


@dataclass(eq=False)
class Allocation:
    """A live or freed piece of memory."""

    address: int
    data: NDArray[np.uint8]
    owner: str
    device: int = 0
    live: bool = True


@dataclass
class _Stream:
    queue: deque[Operation] = field(default_factory=deque)
    queued: int = 0
    done: int = 0


class FakeCuda:
    """A driver for GPUs of `memory` bytes, of which its own context takes `overhead`.

    Attributes:
        log: Every call, as a tuple of its name and its arguments, and what engines did, in order.
        in_use: Device bytes that are allocated now; `peak` is the most there were.
        refuse_capture: Whether captures fail when they end.
        crashes_in: The operation that reads memory which is not there; None for none.
        lost: Whether one has done so: from then on every call fails.
    """

    def __init__(self, memory: int = 2**40, gpu: str = "sm89", count: int = 1, overhead: int = 0) -> None:
        self.log: list[tuple[Any, ...]] = []
        self.in_use = self.peak = 0
        self.refuse_capture = False
        self.crashes_in: str | None = None
        self.lost = False
        self._thread = threading.local()
        self.violations: list[str] = []
        self.engines = 0
        self._total, self._gpu, self._count, self._overhead = memory, gpu, count, overhead
        self._next_address, self._next_handle = 0x7F0000000000, 1
        self._device: dict[int, Allocation] = {}
        self._host: dict[int, Allocation] = {}
        self._buried: list[Allocation] = []
        self._streams: dict[int, _Stream] = {}
        self._events: dict[int, tuple[int, int] | None] = {}
        self._devices: dict[int, int] = {}  # of streams, events and graphs, by handle
        self._graphs: dict[int, list[Operation]] = {}
        self._capturing: int | None = None
        self._captured: list[Operation] = []
        self.capture_broken = False

    # What the backend calls

    def count(self) -> int:
        return self._count

    def gpu(self, device: int) -> Gpu:
        if device >= self._count:
            raise EngineError(f"there is no GPU {device}", fix="use another")
        return Gpu("Fake GPU", self._gpu, self._total, "580.65")

    def use(self, device: int) -> None:
        assert device < self._count
        self._thread.device = device

    @property
    def gpus_used(self) -> set[int]:
        """The GPUs that streams, events and graphs were ever made on."""
        return set(self._devices.values())

    @property
    def current(self) -> int:
        """The calling thread's device, which is the first until it says another."""
        return int(getattr(self._thread, "device", 0))

    def _may(self, what: str, *, capturing: bool = False) -> None:
        """Refuse what cannot be done while a stream is captured, or after the device was lost."""
        if self.lost:
            raise EngineError("the GPU read or wrote memory that is not there", fix="report this")
        if self._capturing is not None and not capturing:
            raise MisuseError(f"{what} during a capture")

    def _here(self, handle: int, what: str) -> None:
        if self._devices[handle] != self.current:
            raise MisuseError(f"{what} of GPU {self._devices[handle]} is used by a thread on GPU {self.current}")

    def memory_info(self) -> tuple[int, int]:
        self._may("free memory is asked for", capturing=True)
        return self._total - self._overhead - self.in_use, self._total

    def malloc(self, nbytes: int, owner: str = "backend") -> int:
        self._may("memory is allocated")
        if nbytes <= 0:
            raise MisuseError(f"{nbytes} bytes are allocated")
        if self._overhead + self.in_use + nbytes > self._total:
            raise OutOfMemoryError("the device is out of memory", fix="use less")
        address = self._next_address
        self._next_address += (nbytes // _ALIGNMENT + 2) * _ALIGNMENT  # a gap, so that no copy reaches a neighbour
        self._device[address] = Allocation(address, np.full(nbytes, _GARBAGE, np.uint8), owner, self.current)
        self.in_use += nbytes
        self.peak = max(self.peak, self.in_use)
        self.log.append(("malloc", address, nbytes, owner))
        return address

    def free(self, address: int) -> None:
        self.log.append(("free", address))
        self._may("memory is freed")
        if address not in self._device:
            raise MisuseError(f"{address:#x} is freed twice, or was never allocated")
        allocation = self._device.pop(address)
        self.in_use -= allocation.data.nbytes
        self._bury(allocation)

    def malloc_host(self, nbytes: int) -> int:
        self._may("host memory is allocated")
        data = np.full(nbytes, _GARBAGE, np.uint8)
        address = int(data.ctypes.data)
        self._host[address] = Allocation(address, data, "host")
        self.log.append(("malloc_host", address, nbytes))
        return address

    def free_host(self, address: int) -> None:
        self.log.append(("free_host", address))
        self._may("host memory is freed")
        if address not in self._host:
            raise MisuseError(f"pinned {address:#x} is freed twice, or was never allocated")
        self._bury(self._host.pop(address))

    def _bury(self, allocation: Allocation) -> None:
        """Keep the array, so that a stray pointer crashes nothing, and spoil what is in it."""
        allocation.live = False
        allocation.data[...] = _GARBAGE
        self._buried.append(allocation)

    def copy_to_device(self, device: int, host: int, nbytes: int, stream: int) -> None:
        self.log.append(("copy_to_device", device, nbytes))
        self._copy("copy_to_device", self.region(device, nbytes), self._pinned(host, nbytes), stream)

    def copy_to_host(self, host: int, device: int, nbytes: int, stream: int) -> None:
        self.log.append(("copy_to_host", device, nbytes))
        self._copy("copy_to_host", self._pinned(host, nbytes), self.region(device, nbytes), stream)

    def _copy(self, name: str, target: "Region", source: "Region", stream: int) -> None:
        def work() -> None:
            target.write(source.read())

        self.enqueue(stream, Operation(name, work, (target.allocation, source.allocation)))

    def create_stream(self) -> int:
        self._may("a stream is made")
        return self._new(self._streams, _Stream())

    def destroy_stream(self, stream: int) -> None:
        self._may("a stream is destroyed")
        if self._streams[stream].queue:
            raise MisuseError("a stream is destroyed with work queued on it")
        del self._streams[stream]

    def synchronize(self, stream: int) -> None:
        self._may("a stream is waited for")
        self._drain(stream, self._streams[stream].queued)

    def create_event(self) -> int:
        self._may("an event is made", capturing=True)
        return self._new(self._events, None)

    def destroy_event(self, event: int) -> None:
        self._may("an event is destroyed", capturing=True)
        del self._events[event]

    def record(self, event: int, stream: int) -> None:
        self._may("an event is recorded", capturing=True)
        if self._devices[event] != self._devices[stream]:
            raise MisuseError("an event is recorded on a stream of another GPU")
        self._events[event] = (stream, self._streams[stream].queued)

    def wait(self, stream: int, event: int) -> None:
        self._may("an event from outside is waited for")
        place = self._events[event]
        if place is not None:
            self.enqueue(stream, Operation("wait", lambda: self._drain(*place)))

    def synchronize_event(self, event: int) -> None:
        self._may("an event is waited for")
        place = self._events[event]
        if place is not None:
            self._drain(*place)

    def begin_capture(self, stream: int) -> None:
        self._may("another capture begins")
        self._here(stream, "a stream")
        self._capturing, self._captured, self.capture_broken = stream, [], False

    def end_capture(self, stream: int) -> int:
        assert self._capturing == stream
        self._capturing = None
        self._may("a capture ends")
        if self.refuse_capture or self.capture_broken:
            raise EngineError("the capture is invalid", fix="do not capture")
        graph = self._new(self._graphs, self._captured)
        self.log.append(("capture", graph, *(operation.name for operation in self._captured)))
        return graph

    def launch(self, graph: int, stream: int) -> None:
        self._may("a graph is launched")
        if graph not in self._graphs:
            raise MisuseError("a graph is launched that is gone")
        self._here(stream, "a stream")
        self.log.append(("launch", graph))
        for operation in self._graphs[graph]:
            if not all(allocation.live for allocation in operation.needs):
                raise MisuseError(f"a graph of {operation.name} is launched whose memory is gone")
            self.enqueue(stream, operation)

    def destroy_graph(self, graph: int) -> None:
        self.log.append(("destroy_graph", graph))
        self._may("a graph is destroyed")
        if graph not in self._graphs:
            raise MisuseError("a graph is destroyed twice")
        del self._graphs[graph]

    # What engines and tests call

    @property
    def capturing(self) -> bool:
        return self._capturing is not None

    def region(self, address: int, nbytes: int) -> "Region":
        """Return device memory, which must be allocated, and all of it one allocation."""
        return _region(self._device, address, nbytes)

    def _pinned(self, address: int, nbytes: int) -> "Region":
        return _region(self._host, address, nbytes)

    def check_address(self, address: int, what: str) -> None:
        """Refuse an address that is not device memory of this thread's GPU, or not aligned as its kernels need it."""
        allocation = self.region(address, 1).allocation
        if address % _ALIGNMENT:
            raise MisuseError(f"{what} lies at {address:#x}, which is not aligned to {_ALIGNMENT} bytes")
        if allocation.device != self.current:
            raise MisuseError(f"{what} lies on GPU {allocation.device}, and is used on GPU {self.current}")

    def kernel(self, stream: int, operation: Operation) -> None:
        """Launch a kernel, which the current device must do."""
        self._here(stream, "a stream")
        self.enqueue(stream, operation)

    def enqueue(self, stream: int, operation: Operation) -> None:
        """Put an operation behind what is queued on a stream, or into the graph that is being captured from it."""
        self._may(f"{operation.name} is queued", capturing=True)
        if self._capturing == stream:
            self._captured.append(operation)
            return
        self._streams[stream].queue.append(operation)
        self._streams[stream].queued += 1

    def abandon(self) -> None:
        """Drop all that is queued, as a device does that failed."""
        for stream in self._streams.values():
            stream.done = stream.queued
            stream.queue.clear()

    def _drain(self, stream: int, until: int) -> None:
        found = self._streams.get(stream)
        while found is not None and found.done < until:
            operation = found.queue.popleft()
            found.done += 1
            if not all(allocation.live for allocation in operation.needs):
                raise MisuseError(f"{operation.name} uses memory after it was freed")
            if operation.name == self.crashes_in:
                self.lost = True
                self._may("nothing")
            operation.work()

    def _new(self, table: dict[int, Any], value: Any) -> int:
        handle, self._next_handle = self._next_handle, self._next_handle + 1
        table[handle], self._devices[handle] = value, self.current
        return handle

    def calls(self, name: str) -> list[tuple[Any, ...]]:
        """Return the arguments of every call of a name."""
        return [entry[1:] for entry in self.log if entry[0] == name]

    def assert_clean(self) -> None:
        """Raise MisuseError when anything is left."""
        left = {
            "device memory": [a.address for a in self._device.values()],
            "pinned memory": list(self._host),
            "streams": list(self._streams),
            "events": list(self._events),
            "graphs": list(self._graphs),
            "engines": [self.engines] if self.engines else [],
            "violations": self.violations,
        }
        leaks = {name: things for name, things in left.items() if things}
        if leaks:
            raise MisuseError(f"left behind: {leaks}")


@dataclass(frozen=True)
class Region:
    """A part of an allocation."""

    allocation: Allocation
    start: int
    nbytes: int

    def read(self) -> bytes:
        return self.allocation.data[self.start : self.start + self.nbytes].tobytes()

    def write(self, values: bytes) -> None:
        self.allocation.data[self.start : self.start + self.nbytes] = np.frombuffer(values, np.uint8)


def _region(table: dict[int, Allocation], address: int, nbytes: int) -> Region:
    for allocation in table.values():
        start = address - allocation.address
        if start >= 0 and start + nbytes <= allocation.data.nbytes:
            return Region(allocation, start, nbytes)
    raise MisuseError(f"{nbytes} bytes at {address:#x} are not allocated, or reach out of what is")
