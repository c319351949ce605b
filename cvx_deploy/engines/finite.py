"""A backend around another that looks for values that are not finite numbers, after every run of every network.

Every output comes to the host for it, the VAE's caches too, and nothing is queued while it is looked at: runs are slow.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from cvx_deploy.bundle.schema import Network
from cvx_deploy.engines.backend import Backend, DeviceTensor, Session
from cvx_deploy.errors import EngineError


class FiniteBackend:
    """Runs what another backend runs, and stops at the first NaN or infinity; see `engines.backend.Backend`.

    What a network takes from the host is looked at too: the finished latents are what the VAE's decoder takes, and the
    frames what it puts out.
    """

    def __init__(self, backend: Backend) -> None:
        self.bundle = backend.bundle
        self._backend = backend
        self._timesteps: list[int] = []

    @contextmanager
    def load(self, role: str, sizes: Mapping[str, int]) -> Iterator["FiniteSession"]:
        """Load a network for the block; see `Backend.load`."""
        if role == "modulation":
            self._timesteps.clear()
        with self._backend.load(role, sizes) as session:
            yield FiniteSession(role, self._backend, session, self._timesteps)

    def to_device(self, array: NDArray[Any]) -> DeviceTensor:
        """See `Backend.to_device`."""
        return self._backend.to_device(array)

    def to_host(self, tensor: DeviceTensor) -> NDArray[Any]:
        """See `Backend.to_host`."""
        return self._backend.to_host(tensor)


class FiniteSession:
    """One loaded network whose in- and outputs are looked at.

    Args:
        role: The network's.
        backend: Where it runs.
        session: It, loaded.
        timesteps: Those that the modulation network has been run for; each run of it adds its own.
    """

    def __init__(self, role: str, backend: Backend, session: Session, timesteps: list[int]) -> None:
        self._role, self._backend, self._session = role, backend, session
        self._network: Network = backend.bundle.network(role)
        self._runs = 0
        self._timesteps = timesteps

    def run(self, inputs: Mapping[str, Any]) -> dict[str, DeviceTensor]:
        """Run the network once.

        Raises:
            EngineError: What it is given from the host, or what it puts out, is not finite.
        """
        self._runs += 1
        if "timestep" in inputs:
            self._timesteps.append(int(np.asarray(inputs["timestep"])[0]))
        for name, tensor in inputs.items():
            if isinstance(tensor, np.ndarray):
                self._check("was given", name, tensor)
        outputs = self._session.run(inputs)
        for spec in self._network.outputs:
            if spec.dtype.startswith("float"):
                self._check("put out", spec.name, self._backend.to_host(outputs[spec.name]))
        return outputs

    def _when(self) -> str:
        """Say which run it is; of networks that run at every step, which step: each video takes the same ones."""
        if self._role not in ("modulation", "transformer") or not self._timesteps:
            return f"run {self._runs}"
        step = (self._runs - 1) % len(self._timesteps)
        return f"step {step + 1} (timestep {self._timesteps[step]})"

    def _check(self, did: str, name: str, values: NDArray[Any]) -> None:
        if not np.isfinite(values).all():
            self._fail(did, name, values)

    def _fail(self, did: str, name: str, values: NDArray[Any]) -> NoReturn:
        missing, infinite = (int(np.count_nonzero(find(values))) for find in (np.isnan, np.isinf))
        found = " and ".join(
            f"{count:,} {kind}" for count, kind in ((missing, "NaN"), (infinite, "infinite values")) if count
        )
        raise EngineError(
            f"{self._role} {did} {found} among the {values.size:,} of {name} at {self._when()}", fix=self._fix()
        )

    def _fix(self) -> str:
        if self._network.precision != "fp16":
            return "check the weights with cvx-deploy verify, and see whether another --engine gives numbers there"
        if self._role == "text_encoder":
            return "T5-XXL overflows in fp16: export with --precision bf16, or fp32 for the CPU"
        return "fp16 ends at 65504: export with --precision bf16, or fp32 for the CPU"
