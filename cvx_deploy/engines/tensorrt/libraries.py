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


def load_library(kind: EngineKind) -> Library:
    """Import a TensorRT library.

    Raises:
        EngineError: It is not installed, or what is installed cannot be loaded.
    """
    fix = pip_install(_INSTALL[kind])
    try:
        module = importlib.import_module(_MODULES[kind])
    except ImportError as error:
        raise EngineError(f"{kind} is not installed here ({error})", fix=fix) from error
    except (OSError, RuntimeError) as error:
        raise EngineError(f"{kind} is installed and cannot be loaded: {error}", fix=fix) from error
    return Library(kind, module, module.__version__)


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
