"""One network in TensorRT: its in- and outputs on the device, and its runs."""

from collections.abc import Callable, Hashable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cvx_deploy.bundle.schema import Network, TensorSpec, numpy_dtype
from cvx_deploy.engines.cuda import Cuda
from cvx_deploy.engines.tensorrt.cuda_graphs import Launcher
from cvx_deploy.engines.tensorrt.device_memory import Activations, Buffer, Constant, DeviceMemory, DeviceTensor, Upload
from cvx_deploy.engines.tensorrt.device_memory import tensor_bytes as bytes_of
from cvx_deploy.engines.tensorrt.engine import Engine
from cvx_deploy.errors import EngineError


@dataclass(frozen=True)
class Device:
    """What the networks of one GPU share.

    Attributes:
        number: Which GPU.
        stream: Where all of them run, one after another.
    """

    cuda: Cuda
    number: int
    stream: int
    memory: DeviceMemory
    block: Activations


@dataclass(frozen=True)
class BoundTensor:
    """One in- or output with its sizes in numbers."""

    shape: tuple[int, ...]
    dtype: "np.dtype[Any]"

    @classmethod
    def of(cls, spec: TensorSpec, sizes: Mapping[str, int]) -> "BoundTensor":
        """Return what the manifest says of it at these sizes."""
        return cls(spec.resolve(dict(sizes)), numpy_dtype(spec.dtype))

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return bytes_of(self.shape, self.dtype)

    def __str__(self) -> str:
        return f"{self.dtype} {self.shape}"


class Layout:
    """Where the in- and outputs of a network lie.

    What a network takes from the host has a place of its own. What runs hand on (the VAE's caches) lies in one of two
    sets of buffers, which all networks that hand it on share: a run writes the set that it does not read. So the caches
    go from the first chunk's network to the next one's, and from run to run, and are never copied. A network that reads
    what it wrote the run before has two sets of its other outputs too, so that those of one run can be fetched while
    the next one runs.

    Attributes:
        inputs: By name, in the manifest's order; `outputs` likewise.
        handed: Input name to output name, of what is handed on.
        sets: 1 or 2.
    """

    def __init__(self, described: Network, sizes: Mapping[str, int]) -> None:
        self.inputs = {spec.name: BoundTensor.of(spec, sizes) for spec in described.inputs}
        self.outputs = {spec.name: BoundTensor.of(spec, sizes) for spec in described.outputs}
        self.handed = described.state
        self.sets = 2 if described.state.keys() & self.inputs.keys() else 1

    def shared(self) -> dict[Hashable, int]:
        """Return the keys of the buffers that it shares, and their bytes."""
        return {
            self.key(taken, number): self.outputs[given].nbytes
            for taken, given in self.handed.items()
            for number in range(self.sets)
        }

    def key(self, taken: str, number: int) -> Hashable:
        """Return the key of what the networks share for a tensor that is handed on as input `taken`."""
        return taken, str(self.outputs[self.handed[taken]]), number

    def own_bytes(self) -> int:
        """Return the bytes of what it does not share."""
        inputs = sum(tensor.nbytes for name, tensor in self.inputs.items() if name not in self.handed)
        handed = set(self.handed.values())
        return inputs + self.sets * sum(t.nbytes for name, t in self.outputs.items() if name not in handed)


class TrtSession:
    """A loaded network; see `runtime.backend.Session`.

    Args:
        role: The network's role, for messages.
        sizes: The symbolic sizes it is loaded at.
        described: The network's interface.
        graphs: Whether runs that come again become CUDA graphs.
        refused: Called with the role, when the library does not let its runs be captured.

    Attributes:
        open: How many blocks use it now.
    """

    def __init__(
        self,
        device: Device,
        engine: Engine,
        role: str,
        sizes: Mapping[str, int],
        described: Network,
        *,
        graphs: bool,
        refused: Callable[[str], None],
        failure: Callable[[str], EngineError],
    ) -> None:
        self.role, self.engine, self.open = role, engine, 0
        self.layout = Layout(described, sizes)
        self._device, self._failure = device, failure
        self._uploads: dict[str, Upload] = {}
        self._sets: list[dict[str, Buffer]] = []
        self._events: list[int] = []
        with ExitStack() as stack:
            stack.callback(self._free_tensors)
            self._context = self._create_context()
            self._allocate()
            stack.pop_all()
        self._launcher = Launcher(
            device.cuda,
            device.stream,
            self._context,
            graphs=graphs,
            refused=lambda: refused(role),
            failure=lambda: failure(f"failed in {role}"),
        )

    def _create_context(self) -> Any:
        names = {*self.layout.inputs, *self.layout.outputs}
        if self.engine.tensors != names:
            raise self._foreign(f"has the in- and outputs {', '.join(sorted(self.engine.tensors))}")
        context = self.engine.create_context()
        for name, tensor in self.layout.inputs.items():
            if not context.set_input_shape(name, tensor.shape):
                raise self._foreign(f"does not take {name} of {tensor}")
        for name, tensor in (self.layout.inputs | self.layout.outputs).items():
            found = tuple(context.get_tensor_shape(name))
            if found != tensor.shape or self.engine.bytes_per_element(name) != tensor.dtype.itemsize:
                raise self._foreign(f"has {name} of {found}, and {tensor} is expected")
        return context

    def _foreign(self, what: str) -> EngineError:
        return EngineError(
            f"the engine of {self.role} is none of this bundle: it {what}",
            fix="build it again; run: cvx-deploy build --help",
        )

    def _allocate(self) -> None:
        layout, memory = self.layout, self._device.memory
        for name in layout.inputs:
            if name not in layout.handed:
                self._upload(name)
        taken_as = {given: taken for taken, given in layout.handed.items()}
        for number in range(layout.sets):
            self._sets.append({})
            for name, tensor in layout.outputs.items():
                if name in taken_as:
                    buffer = memory.share(layout.key(taken_as[name], number), tensor.nbytes, self)
                else:
                    buffer = memory.allocate(tensor.nbytes)
                self._sets[number][name] = buffer
            self._events.append(self._device.cuda.create_event())

    def _upload(self, name: str) -> Upload:
        if name not in self._uploads:
            tensor = self.layout.inputs[name]
            self._uploads[name] = Upload(self._device.cuda, self._device.memory, tensor.shape, tensor.dtype)
        return self._uploads[name]

    def use_block(self) -> None:
        """Compute in the activation block as it is now; graphs that were captured with another one are gone."""
        self._context.set_device_memory(self._device.block.address, self._device.block.nbytes)

    def forget_graphs(self) -> None:
        """Let go of the graphs, whose activation block is about to be replaced."""
        self._launcher.forget()

    def run(self, inputs: Mapping[str, NDArray[Any] | DeviceTensor | Constant]) -> dict[str, DeviceTensor]:
        """Queue one run; its outputs stand until the network runs again (a network with state: twice again).

        Raises:
            EngineError: An input is missing, of another shape or type, or was written over since; the network is no
                longer loaded; or the library refuses.
        """
        self._check(inputs)
        self._device.cuda.use(self._device.number)
        addresses = {name: self._place(name, value).address for name, value in inputs.items()}
        number = self._free_set(inputs)
        written = self._sets[number]
        ordered = {name: addresses[name] for name in self.layout.inputs}
        self._launcher.run(ordered | {name: buffer.address for name, buffer in written.items()})
        self._device.cuda.record(self._events[number], self._device.stream)
        return {name: self._written(name, number) for name in written}

    def _check(self, inputs: Mapping[str, NDArray[Any] | DeviceTensor | Constant]) -> None:
        if not self.open:
            raise EngineError(f"{self.role} is run after it was let go of", fix="run it within its block")
        if inputs.keys() != self.layout.inputs.keys():
            given = ", ".join(sorted(inputs))
            raise EngineError(
                f"{self.role} takes {', '.join(self.layout.inputs)}, and is given {given}",
                fix="export the bundle again with this version of cvx-deploy",
            )
        for name, value in inputs.items():
            tensor = value.array if isinstance(value, Constant) else value
            found = BoundTensor(tuple(tensor.shape), tensor.dtype)
            if found != self.layout.inputs[name]:
                raise EngineError(
                    f"{self.role} takes {name} as {self.layout.inputs[name]}, not {found}",
                    fix="load it at the sizes it is run with",
                )

    def _place(self, name: str, value: NDArray[Any] | DeviceTensor | Constant) -> Buffer:
        """Return the buffer an input lies in, after its copy is queued where it comes from the host."""
        if isinstance(value, DeviceTensor):
            value.check()
            return value.buffer
        upload = self._upload(name)
        upload.put(value, self._device.stream)
        return upload.buffer

    def _free_set(self, inputs: Mapping[str, Any]) -> int:
        """Return the first set of outputs that this run does not read."""
        read = {value.buffer for value in inputs.values() if isinstance(value, DeviceTensor)}
        for number, buffers in enumerate(self._sets):
            if read.isdisjoint(buffers.values()):
                return number
        raise EngineError(f"{self.role} is given outputs of two runs", fix="give it those of one run")

    def _written(self, name: str, number: int) -> DeviceTensor:
        buffer, tensor = self._sets[number][name], self.layout.outputs[name]
        buffer.version += 1
        return DeviceTensor(buffer, buffer.version, tensor.shape, tensor.dtype, self._events[number])

    def close(self) -> None:
        """Free everything but the engine; nothing queued may still need it."""
        self._launcher.forget()
        del self._launcher
        self._free_tensors()

    def _free_tensors(self) -> None:
        self._context = None  # before the memory that it was given
        cuda, memory = self._device.cuda, self._device.memory
        handed = set(self.layout.handed.values())
        for buffers in self._sets:
            for name, buffer in buffers.items():
                if name not in handed:
                    memory.free(buffer)
        memory.unshare(self)
        for upload in self._uploads.values():
            upload.free()
        for event in self._events:
            cuda.destroy_event(event)
        self._sets, self._uploads, self._events = [], {}, []
