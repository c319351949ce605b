"""What a kind of engine says of itself; `engines.registry` has them all."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Final

from cvx_deploy.engines.residency import Policy
from cvx_deploy.errors import EngineError
from cvx_deploy.progress import Progress

if TYPE_CHECKING:
    from cvx_deploy.bundle.opened import Bundle
    from cvx_deploy.bundle.schema import Manifest
    from cvx_deploy.engines.backend import Backend

EngineName = str
Needed = Sequence[tuple[str, Mapping[str, int]]]
"""Role and sizes of every network that will be loaded."""


@dataclass(frozen=True)
class EngineOptions:
    """How an engine is to run; what an engine does not take stays as it is here.

    Attributes:
        threads: CPU threads within an operator; None for one per core.
        device: Which GPU.
        vram: Bytes of device memory that may be used; None for all there are.
        cuda_graphs: Whether runs that come again are launched as CUDA graphs.
        residency: Which networks stay loaded.
        ram: Bytes of the machine's memory that an engine on a CPU may use; None for what this process may have.
    """

    threads: int | None = None
    device: int = 0
    vram: int | None = None
    cuda_graphs: bool = True
    residency: Policy = "resident"
    ram: int | None = None

    def given(self) -> set[str]:
        """Return the options that are not what they are by default."""
        return {field.name for field in fields(self) if getattr(self, field.name) != field.default}


DEFAULT_OPTIONS: Final = EngineOptions()


@dataclass(frozen=True)
class Probe:
    """What an engine can do on this machine.

    Attributes:
        runs: Whether it is there.
        what: What it runs here, or why it does not.
        fix: What to do about that.
    """

    runs: bool
    what: str
    fix: str = ""


@dataclass(frozen=True)
class EngineSpec:
    """One kind of engine.

    Attributes:
        name: What people type after ``--engine``.
        where: ``cpu`` or ``gpu``.
        compiled: Whether it runs what `cvx-deploy build` has compiled, and nothing else.
        takes: The fields of `EngineOptions` that mean something to it.
        version: Returns its library's version, or raises EngineError where it is not installed.
        probe: Tells what it can do here.
        obstacle: Tells why it cannot run a bundle that says this, on this machine; empty where it can.
        open: Opens a bundle on it for the block; no weights are loaded yet, and an engine that is needed and has not
            been compiled is said at once.
    """

    name: EngineName
    where: str
    compiled: bool
    takes: frozenset[str]
    version: Callable[[], str]
    probe: Callable[[], Probe]
    obstacle: Callable[["Manifest"], str]
    open: Callable[["Bundle", EngineOptions, Needed, Progress], AbstractContextManager["Backend"]]

    @property
    def on_gpu(self) -> bool:
        """Whether it runs on a GPU, and so on one of several."""
        return self.where == "gpu"

    def check(self, options: EngineOptions) -> None:
        """Refuse options that mean nothing to it.

        Raises:
            EngineError: Which, and which engines take them.
        """
        for name in sorted(options.given() - self.takes - {"residency"}):
            raise EngineError(f"{name} means nothing to the engine {self.name}", fix=f"leave {name} out")
