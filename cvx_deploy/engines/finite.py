"""The check for values that are not finite numbers, before and after every run of every network.

Every output comes to the host for it, the VAE's caches too, and nothing is queued while it is looked at: runs are slow.
"""

from collections.abc import Mapping
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from cvx_deploy.engines.backend import Backend, DeviceTensor
from cvx_deploy.engines.observe import Observer
from cvx_deploy.errors import EngineError


class FiniteCheck(Observer):
    """Stops a run at the first NaN or infinity.

    What a network takes from the host is looked at too: the finished latents are what the VAE's decoder takes, and the
    frames what it puts out.

    Args:
        backend: Where the networks run: it brings what they put out to the host.

    Raises:
        EngineError: What a network is given from the host, or what it puts out, is not finite.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._timesteps: list[int] = []  # those that the modulation network has been run for
        self._runs: dict[str, int] = {}

    def loaded(self, role: str, start: float, end: float) -> None:
        """Count the runs of a network from here."""
        self._runs[role] = 0
        if role == "modulation":
            self._timesteps.clear()

    def before(self, role: str, inputs: Mapping[str, Any]) -> None:
        """Look at what comes from the host."""
        self._runs[role] += 1
        if "timestep" in inputs:
            self._timesteps.append(int(np.asarray(inputs["timestep"])[0]))
        for name, tensor in inputs.items():
            if isinstance(tensor, np.ndarray):
                self._check(role, "was given", name, tensor)

    def after(self, role: str, outputs: Mapping[str, DeviceTensor]) -> None:
        """Look at what was put out."""
        for spec in self._backend.bundle.network(role).outputs:
            if spec.dtype.startswith("float"):
                self._check(role, "put out", spec.name, self._backend.to_host(outputs[spec.name]))

    def _when(self, role: str) -> str:
        """Say which run it is; of networks that run at every step, which step: each video takes the same ones."""
        if role not in ("modulation", "transformer") or not self._timesteps:
            return f"run {self._runs[role]}"
        step = (self._runs[role] - 1) % len(self._timesteps)
        return f"step {step + 1} (timestep {self._timesteps[step]})"

    def _check(self, role: str, did: str, name: str, values: NDArray[Any]) -> None:
        if not np.isfinite(values).all():
            self._fail(role, did, name, values)

    def _fail(self, role: str, did: str, name: str, values: NDArray[Any]) -> NoReturn:
        missing, infinite = (int(np.count_nonzero(find(values))) for find in (np.isnan, np.isinf))
        found = " and ".join(
            f"{count:,} {kind}" for count, kind in ((missing, "NaN"), (infinite, "infinite values")) if count
        )
        raise EngineError(
            f"{role} {did} {found} among the {values.size:,} of {name} at {self._when(role)}", fix=self._fix(role)
        )

    def _fix(self, role: str) -> str:
        if self._backend.bundle.network(role).precision != "fp16":
            return "check the weights with cvx-deploy verify, and see whether another --engine gives numbers there"
        if role == "text_encoder":
            return "T5-XXL overflows in fp16: export with --precision bf16, or fp32 for the CPU"
        return "fp16 ends at 65504: export with --precision bf16, or fp32 for the CPU"
