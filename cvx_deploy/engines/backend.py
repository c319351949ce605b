"""The seam between the sampler and an engine: load a network, run it, leave its tensors where they are.

Anything with these methods is a backend; the tests drive the sampler with one of ten lines.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol, runtime_checkable

from numpy.typing import NDArray

from cvx_deploy.bundle.opened import Bundle

DeviceTensor = Any
"""A tensor as the engine holds it; only the backend that made it looks inside."""


class Session(Protocol):
    """One loaded network."""

    def run(self, inputs: Mapping[str, "NDArray[Any] | DeviceTensor"]) -> dict[str, DeviceTensor]:
        """Run the network once; inputs are host arrays, or outputs of an earlier run, which never left the device."""


class Backend(Protocol):
    """An engine that runs the networks of one bundle, at the shape the bundle is seen at."""

    @property
    def bundle(self) -> Bundle:
        """What it runs."""

    def load(self, role: str, sizes: Mapping[str, int]) -> AbstractContextManager[Session]:
        """Give the network of a role for the block, with its symbolic sizes fixed; what is loaded is not loaded anew.

        Raises:
            BundleError: The network's files are missing, truncated or altered.
            EngineError: This engine cannot run it.
        """

    def to_device(self, array: NDArray[Any]) -> DeviceTensor:
        """Return a tensor of values that do not change, brought to the device once for as many runs as take it."""

    def to_host(self, tensor: DeviceTensor) -> NDArray[Any]:
        """Copy a tensor to the host."""


@runtime_checkable
class Prefetching(Protocol):
    """A backend that can load a network while another one runs."""

    def prefetch(self, role: str, sizes: Mapping[str, int]) -> None:
        """Begin to load a network that is needed soon, if it is one that will stay loaded."""


def prefetch(backend: Backend, role: str, sizes: Mapping[str, int]) -> None:
    """Begin to load a network that is needed soon, where the backend can."""
    if isinstance(backend, Prefetching):
        backend.prefetch(role, sizes)
