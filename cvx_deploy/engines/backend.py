"""The seam between the sampler and an engine: load a network, run it, leave its tensors where they are.

Anything with these methods is a backend; the tests drive the sampler with one of ten lines.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

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

    bundle: Bundle

    def load(self, role: str, sizes: Mapping[str, int]) -> AbstractContextManager[Session]:
        """Load the network of a role for as long as the block lasts, with its symbolic sizes fixed.

        Raises:
            BundleError: The network's files are missing, truncated or altered.
            EngineError: This engine cannot run it.
        """

    def to_device(self, array: NDArray[Any]) -> DeviceTensor:
        """Return a tensor of values that do not change, brought to the device once for as many runs as take it."""

    def to_host(self, tensor: DeviceTensor) -> NDArray[Any]:
        """Copy a tensor to the host."""
