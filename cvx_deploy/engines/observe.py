"""One hook for all that looks on while networks are loaded and run: clocks, recorders, the check for finite numbers."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from numpy.typing import NDArray

from cvx_deploy.bundle.opened import Bundle
from cvx_deploy.engines.backend import Backend, DeviceTensor, Session, prefetch


class Observer:
    """What is told of every network; each method does nothing unless it is written anew."""

    def loaded(self, role: str, start: float, end: float) -> None:
        """A network is there for a block; it took from `start` to `end` on the system's monotonic clock."""

    def before(self, role: str, inputs: Mapping[str, Any]) -> None:
        """It is about to run on these, host arrays or tensors of the engine; what is raised here ends the run."""

    def after(self, role: str, outputs: Mapping[str, DeviceTensor]) -> None:
        """It has put these out, tensors of the engine; what is raised here ends the run."""


class ObservedBackend:
    """Runs what another backend runs, and tells observers of it; see `Backend`."""

    def __init__(self, backend: Backend, *observers: Observer) -> None:
        self._backend, self._observers = backend, observers

    @property
    def bundle(self) -> Bundle:
        """What it runs, at the shape it is seen at."""
        return self._backend.bundle

    @contextmanager
    def load(self, role: str, sizes: Mapping[str, int]) -> Iterator["_ObservedSession"]:
        """Load a network for the block; see `Backend.load`."""
        with ExitStack() as stack:
            start = time.monotonic()
            session = stack.enter_context(self._backend.load(role, sizes))
            end = time.monotonic()
            for observer in self._observers:
                observer.loaded(role, start, end)
            yield _ObservedSession(role, session, self._observers)

    def prefetch(self, role: str, sizes: Mapping[str, int]) -> None:
        """See `Prefetching.prefetch`."""
        prefetch(self._backend, role, sizes)

    def to_device(self, array: NDArray[Any]) -> DeviceTensor:
        """See `Backend.to_device`."""
        return self._backend.to_device(array)

    def to_host(self, tensor: DeviceTensor) -> NDArray[Any]:
        """See `Backend.to_host`."""
        return self._backend.to_host(tensor)


class _ObservedSession:
    def __init__(self, role: str, session: Session, observers: Sequence[Observer]) -> None:
        self._role, self._session, self._observers = role, session, observers

    def run(self, inputs: Mapping[str, Any]) -> dict[str, DeviceTensor]:
        for observer in self._observers:
            observer.before(self._role, inputs)
        outputs = self._session.run(inputs)
        for observer in self._observers:
            observer.after(self._role, outputs)
        return outputs
