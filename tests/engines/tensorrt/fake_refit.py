"""A TensorRT library whose engines are the weights they were built from, by name, and nothing else."""

import ctypes
import enum
import json
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from types import ModuleType
from typing import Any

from cvx_deploy.engines.tensorrt.libraries import EngineKind, Library

VERSION = "1.2.3"


class _Type(enum.Enum):
    FLOAT, HALF, BF16, INT64 = 4, 2, "2", 8

    @property
    def itemsize(self) -> int:
        return int(self.value)


class _Flag(enum.Enum):
    EXCLUDE_WEIGHTS, EXCLUDE_LEAN_RUNTIME, INCLUDE_REFIT = range(3)


class _SeekPosition(enum.Enum):
    SET, CUR, END = range(3)


@dataclass
class Engine:
    """One engine.

    Attributes:
        weights: Type and bytes by name; no bytes where they were left out of the file.
        combined: Groups of weights that were made one: they are exchanged together.
    """

    weights: dict[str, tuple[str, bytes]]
    refittable: bool = True
    combined: list[list[str]] = field(default_factory=list)

    def to_bytes(self) -> bytes:
        """Return the engine's file."""
        entries = {name: [dtype, len(content)] for name, (dtype, content) in self.weights.items()}
        head = json.dumps({"weights": entries, "refittable": self.refittable, "combined": self.combined})
        return head.encode() + b"\n" + b"".join(content for _, content in self.weights.values())

    @classmethod
    def from_bytes(cls, content: bytes) -> "Engine":
        """Read an engine's file."""
        head, _, rest = content.partition(b"\n")
        facts = json.loads(head)
        weights, start = {}, 0
        for name, (dtype, length) in facts["weights"].items():
            weights[name] = dtype, rest[start : start + length]
            start += length
        return cls(weights, facts["refittable"], facts["combined"])

    def create_serialization_config(self) -> "_Config":
        return _Config()

    def serialize_with_config(self, config: "_Config") -> bytes:
        kept = self.weights
        if _Flag.EXCLUDE_WEIGHTS in config.flags:
            kept = {name: (dtype, b"") for name, (dtype, _) in kept.items()}
        return Engine(kept, self.refittable and _Flag.INCLUDE_REFIT in config.flags, self.combined).to_bytes()


class _Config:
    def __init__(self) -> None:
        self.flags = {_Flag.EXCLUDE_WEIGHTS}

    def set_flag(self, flag: _Flag) -> None:
        self.flags.add(flag)

    def clear_flag(self, flag: _Flag) -> None:
        self.flags.discard(flag)


class _Logger:
    ERROR, INTERNAL_ERROR = "error", "internal error"


class _Reader:
    pass


class _Runtime:
    def __init__(self, logger: Any) -> None:
        self._logger = logger

    def deserialize_cuda_engine(self, reader: Any) -> Engine | None:
        content = b""
        while piece := reader.read(1000, 0):
            content += piece
        try:
            return Engine.from_bytes(content)
        except ValueError:
            self._logger.log(_Logger.ERROR, "the plan's magic number is wrong")
            return None


@dataclass
class _Weights:
    """Bytes by reference, as the library holds them."""

    dtype: _Type
    pointer: int
    count: int


class Refitter:
    """Exchanges weights as TensorRT's does: by name, and only where type and size are the same."""

    def __init__(self, engine: Engine, logger: Any) -> None:
        self._engine, self._logger = engine, logger
        self._new: dict[str, _Weights] = {}

    def get_all_weights(self) -> list[str]:
        return list(self._engine.weights)

    def set_named_weights(self, name: str, weights: _Weights) -> bool:
        dtype, content = self._engine.weights[name]
        length = weights.count * weights.dtype.itemsize
        if weights.dtype.name != dtype or (content and length != len(content)):
            self._logger.log(_Logger.ERROR, f"the type or the size of {name} is another one")
            return False
        self._new[name] = weights
        return True

    def get_missing_weights(self) -> list[str]:
        stripped = [[name] for name, (_, content) in self._engine.weights.items() if not content]
        groups = [group for group in self._engine.combined if not self._new.keys().isdisjoint(group)]
        return [name for group in groups + stripped for name in group if name not in self._new]

    def refit_cuda_engine(self) -> bool:
        if self.get_missing_weights():
            return False
        for name, weights in self._new.items():
            content = ctypes.string_at(weights.pointer, weights.count * weights.dtype.itemsize)
            self._engine.weights[name] = self._engine.weights[name][0], content
        return True


class ForgetfulRefitter(Refitter):
    """One that drops a weight without a word."""

    def set_named_weights(self, name: str, weights: _Weights) -> bool:
        return name.endswith("to_k.weight") or super().set_named_weights(name, weights)


class _Capability(IntEnum):
    SM80, SM89, SM120 = 80, 89, 120


def fake_library(refitter: type[Refitter] = Refitter, kind: EngineKind = "tensorrt-rtx") -> Library:
    """Return a library that loads, refits and writes such engines."""
    module: Any = ModuleType("fake_tensorrt")
    module.ILogger, module.IStreamReaderV2, module.SeekPosition = _Logger, _Reader, _SeekPosition
    module.Runtime, module.Refitter, module.Weights = _Runtime, refitter, _Weights
    module.DataType, module.SerializationFlag = _Type, _Flag
    module.ComputeCapability = _Capability
    return Library(kind, module, VERSION)


def engine_in(path: Path) -> Engine:
    """Read an engine's file."""
    return Engine.from_bytes(path.read_bytes())
