"""Two TensorRT libraries with one API: the full one, and TensorRT for RTX, which compiles without a GPU."""

import importlib
import importlib.util
from dataclasses import dataclass
from types import ModuleType
from typing import Literal, get_args

from cvx_deploy.errors import EngineError
from cvx_deploy.install import pip_install

EngineKind = Literal["tensorrt", "tensorrt-rtx"]
ENGINE_KINDS: tuple[EngineKind, ...] = get_args(EngineKind)

_MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
_INSTALL = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt-rtx"}
_LEAST_TENSORRT = (10, 14)  # the first with IAttention, EngineStat and SerializationFlag.INCLUDE_REFIT


@dataclass(frozen=True)
class Library:
    """One of the two, imported.

    Attributes:
        module: Where ``Builder``, ``OnnxParser``, ``Runtime`` and the rest of the API are.
        version: Such as 1.7.1.116; an engine runs with the version that built it.
    """

    kind: EngineKind
    module: ModuleType
    version: str

    @property
    def ahead_of_time(self) -> bool:
        """Whether engines are built for compute capabilities named beforehand, on any machine."""
        return self.kind == "tensorrt-rtx"

    @property
    def capabilities(self) -> set[str] | None:
        """The compute capabilities it knows, such as sm89; None for the full library, which knows every GPU's."""
        if not self.ahead_of_time:
            return None
        return {f"sm{int(capability)}" for capability in self.module.ComputeCapability.__members__.values()}

    def check_runs_on(self, capability: str) -> None:
        """Raise EngineError where it does not run on GPUs of a compute capability, whatever is built for them."""
        if self.capabilities is not None and capability not in self.capabilities:
            family = " (Hopper)" if capability == "sm90" else ""
            raise EngineError(
                f"{self.kind} {self.version} does not run on {capability}{family}: it is for GeForce and RTX cards",
                fix="build and run on that GPU with --engine tensorrt, or run with --engine onnxruntime-cuda",
            )


def load_library(kind: EngineKind) -> Library:
    """Import a TensorRT library.

    Raises:
        EngineError: It is not installed, or what is installed cannot be loaded or is too old.
    """
    fix = pip_install(_INSTALL[kind])
    try:
        module = importlib.import_module(_MODULES[kind])
    except ImportError as error:
        raise EngineError(f"{kind} is not installed here ({error})", fix=fix) from error
    except (OSError, RuntimeError) as error:
        raise EngineError(f"{kind} is installed and cannot be loaded: {error}", fix=fix) from error
    library = Library(kind, module, module.__version__)
    if not library.ahead_of_time and _numbers(library.version) < _LEAST_TENSORRT:
        least = ".".join(map(str, _LEAST_TENSORRT))
        raise EngineError(f"tensorrt {library.version} is too old: attention needs {least}", fix=f"{fix} --upgrade")
    return library


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2] if part.isdigit())


def choose_library(kind: EngineKind | None, *, ahead_of_time: bool) -> Library:
    """Import the library that was asked for, or the one that suits.

    Args:
        kind: What was asked for; None for tensorrt where it is installed, else tensorrt-rtx.
        ahead_of_time: Whether engines are for GPUs named beforehand, which only tensorrt-rtx can do.

    Raises:
        EngineError: It is not installed.
    """
    if kind is not None:
        return load_library(kind)
    if ahead_of_time or not importlib.util.find_spec(_MODULES["tensorrt"]):
        return load_library("tensorrt-rtx")
    return load_library("tensorrt")
