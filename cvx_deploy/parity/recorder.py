"""A backend around another that keeps the latents which the transformer is given, step by step."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cvx_deploy.engines.backend import Backend, DeviceTensor, Session


class Recorder:
    """Runs what another backend runs; see `engines.backend.Backend`.

    Attributes:
        hidden_states: What the transformer took at each step, (B, F, C, H, W).
    """

    def __init__(self, backend: Backend) -> None:
        self.bundle = backend.bundle
        self.hidden_states: list[NDArray[np.float32]] = []
        self._backend = backend

    @contextmanager
    def load(self, role: str, sizes: Mapping[str, int]) -> Iterator[Session]:
        """Load a network for the block; see `Backend.load`."""
        with self._backend.load(role, sizes) as session:
            yield _Listening(session, self.hidden_states) if role == "transformer" else session

    def to_device(self, array: NDArray[Any]) -> DeviceTensor:
        """See `Backend.to_device`."""
        return self._backend.to_device(array)

    def to_host(self, tensor: DeviceTensor) -> NDArray[Any]:
        """See `Backend.to_host`."""
        return self._backend.to_host(tensor)


class _Listening:
    def __init__(self, session: Session, heard: list[NDArray[np.float32]]) -> None:
        self._session, self._heard = session, heard

    def run(self, inputs: Mapping[str, Any]) -> dict[str, DeviceTensor]:
        self._heard.append(np.array(inputs["hidden_states"]))
        return self._session.run(inputs)
