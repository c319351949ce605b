"""Compiled engines, kept in the bundle under the hash of everything they were made from.

An engine file has a record beside it, ``<network>-<digest>.json``, with the whole key in words. An engine is used only
where every part of its key holds; where none is, the failure says which part differs.
"""

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from cvx_deploy.bundle.command import build_command
from cvx_deploy.bundle.opened import Bundle
from cvx_deploy.bundle.schema import StoredFile
from cvx_deploy.engines.cuda import Gpu
from cvx_deploy.engines.tensorrt.compiled_plan import CompiledPlan
from cvx_deploy.engines.tensorrt.libraries import EngineKind
from cvx_deploy.errors import BundleError, EngineError
from cvx_deploy.files import sha256_of, staged_file
from cvx_deploy.reading import read_whole, reading

if TYPE_CHECKING:
    from cvx_deploy.measure.memory import MemoryWatch

FOLDER = "engines"
_PLAN = ".plan.json"
RECORD_VERSION = 1
Profile = dict[str, tuple[int, int, int]]
"""Symbol (batch, latent_height, latent_width) to its smallest, usual and largest size."""


@dataclass(frozen=True)
class Platform:
    """The GPU an engine is to run on.

    Attributes:
        gpu: Its name, such as NVIDIA GeForce RTX 4090.
        capability: Its compute capability, such as sm89.
        driver: The driver's version.
    """

    gpu: str
    capability: str
    driver: str

    @classmethod
    def of(cls, gpu: Gpu) -> "Platform":
        """Return what engines know of a GPU that the driver describes."""
        return cls(gpu.name, gpu.compute_capability, gpu.driver)


@dataclass(frozen=True)
class EngineKey:
    """Everything an engine depends on.

    Attributes:
        graph: SHA-256 of the ONNX file.
        weights: Plain name to SHA-256, of the weight files it draws from.
        profile: The sizes it was built for.
        settings: How it was built; see `engine.BuildSettings`.
        library: The library's version.
        targets: What it runs on: compute capabilities where it was compiled ahead of time, else the GPU and its driver.
    """

    kind: EngineKind
    graph: str
    weights: dict[str, str]
    profile: Profile
    settings: dict[str, Any]
    library: str
    targets: tuple[str, ...]

    @property
    def digest(self) -> str:
        """The hash that names the engine."""
        return hashlib.sha256(msgspec.json.encode(asdict(self), order="sorted")).hexdigest()[:16]

    def misfits(self, wanted: "EngineNeed") -> list[str]:
        """Say, in words, each part of the key that is not what is wanted."""
        found = []
        if self.graph != wanted.graph:
            found.append("the ONNX graph was another one (the bundle was exported again)")
        for name in sorted(self.weights.keys() | wanted.weights.keys()):
            if self.weights.get(name) != wanted.weights.get(name):
                found.append(f"the weights in {name} were others")
        if self.library != wanted.library:
            found.append(f"it was built with {self.kind} {self.library}, here is {wanted.library}")
        if wanted.platform is not None and not runs_on(self, wanted.platform):
            here = f"{wanted.platform.gpu} ({wanted.platform.capability}), driver {wanted.platform.driver}"
            found.append(f"it was built for {', '.join(self.targets)}, here is {here}")
        for symbol, size in wanted.sizes.items():
            least, _, most = self.profile.get(symbol, (size, size, size))
            if not least <= size <= most:
                found.append(f"it takes {symbol} {least} to {most}, not {size}{_WHY.get((symbol, size), '')}")
        return found


_WHY = {
    ("batch", 1): ", which a run without guidance needs, and one whose two branches run on two GPUs",
    ("batch", 2): ", which guidance needs on one GPU",
}


@dataclass(frozen=True)
class EngineNeed:
    """What an engine must have been made from and for, to be used.

    Attributes:
        sizes: Symbol to size.
        platform: None where it is not to be run, only found.
    """

    graph: str
    weights: dict[str, str]
    library: str
    sizes: Mapping[str, int]
    platform: Platform | None


def runs_on(key: EngineKey, platform: Platform) -> bool:
    """Whether an engine's targets include a GPU."""
    if key.kind == "tensorrt-rtx":
        return platform.capability in key.targets
    compatible = key.settings.get("hardware_compatibility")
    if compatible == "same-capability":
        return platform.capability in key.targets
    if compatible == "ampere-plus":
        return int(platform.capability.removeprefix("sm")) >= 80
    return key.targets == gpu_targets(platform)


def gpu_targets(platform: Platform) -> tuple[str, ...]:
    """Return the targets of an engine that is built on the GPU it will run on."""
    return platform.gpu, platform.capability, f"driver {platform.driver}"


@dataclass(frozen=True)
class EngineRecord:
    """What the store knows of an engine.

    Attributes:
        network: The name of the network in the manifest.
        file: The engine, relative to the bundle.
        mtime_ns: While the file has this time and its size, it is taken to be the one that was hashed.
        plan: The list of its kernels (see `plan.CompiledPlan`), likewise.
        attention: The form its attention was compiled from: fused (one Attention op), decomposed, or none.
        seconds: What the build took.
        peak_bytes: The largest resident memory of the process while it was built.
        private_bytes: That without mapped files.
        built: When, in UTC.
    """

    key: EngineKey
    network: str
    file: StoredFile
    mtime_ns: int
    plan: StoredFile
    attention: str
    seconds: float
    peak_bytes: int
    private_bytes: int
    built: str
    version: int = RECORD_VERSION


@dataclass(frozen=True)
class WrittenEngine:
    """An engine file that was just written at its place, and what it took.

    Attributes:
        attention: See `EngineRecord`.
        memory: Of the process while it was made.
    """

    size: int
    sha256: str
    attention: str
    seconds: float
    memory: "MemoryWatch"


def plans_to_json(plans: tuple[CompiledPlan, ...]) -> bytes:
    """Return the text of ``plan.json``: a list of plans."""
    return b"[" + b",".join(plan.to_json() for plan in plans) + b"]\n"


def plans_from_json(text: bytes) -> tuple[CompiledPlan, ...]:
    """Read what `plans_to_json` wrote."""
    return tuple(CompiledPlan.from_json(bytes(plan)) for plan in msgspec.json.decode(text, type=list[msgspec.Raw]))


def _read(path: Path) -> EngineRecord | None:
    """Return the record in a file; None where there is none that can be read."""
    try:
        with reading(path, EngineError, fix=""):
            record = msgspec.json.decode(read_whole(path, EngineError, fix=""), type=EngineRecord)
    except EngineError:
        return None
    return record if record.version == RECORD_VERSION else None


class EngineStore:
    """The engines of one bundle."""

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle
        self.folder = bundle.path / FOLDER

    def wanted(
        self, network: str, library: str, platform: Platform | None, sizes: Mapping[str, int] | None = None
    ) -> EngineNeed:
        """Return what an engine for a network must have been made from, and for."""
        manifest = self._bundle.manifest
        described = manifest.networks[network]
        weights = {name: manifest.weights[name].sha256 for name in described.weights}
        return EngineNeed(described.file.sha256, weights, library, sizes or {}, platform)

    def remedy(self, kind: EngineKind, gpus: Sequence[Platform]) -> str:
        """Return the command that builds what is missing."""
        target = f" --target {gpus[0].capability}" if kind == "tensorrt-rtx" and gpus else ""
        return build_command(self._bundle.path, f"--engine {kind}{target}")

    def records(self) -> list[EngineRecord]:
        """Return the records that can be read; a damaged one counts as none, and its engine is built again."""
        paths = (path for path in sorted(self.folder.glob("*.json")) if not path.name.endswith(_PLAN))
        return [record for record in map(_read, paths) if record is not None]

    def find(
        self, kind: EngineKind, role: str, sizes: Mapping[str, int], library: str, platform: Platform
    ) -> EngineRecord:
        """Return the newest engine of a kind that can play a role here.

        Raises:
            EngineError: There is none; what differs in the nearest one, and the command that builds it.
        """
        name = self._bundle.network_name(role)
        wanted = self.wanted(name, library, platform, sizes)
        candidates = [record for record in self.records() if record.network == name and record.key.kind == kind]
        fitting = [record for record in candidates if not record.key.misfits(wanted)]
        if fitting:
            return max(fitting, key=lambda record: record.built)
        fix = self.remedy(kind, [platform])
        if not candidates:
            raise EngineError(f"{self._bundle.path} has no {kind} engine for {name}", fix=fix)
        nearest = min(candidates, key=lambda record: len(record.key.misfits(wanted)))
        differs = "; ".join(nearest.key.misfits(wanted))
        raise EngineError(f"no {kind} engine of {self._bundle.path} for {name} fits: {differs}", fix=fix)

    def reuse(self, key: EngineKey, network: str) -> EngineRecord | None:
        """Return the engine with exactly this key, when it is there and whole."""
        record = _read(self._record_path(key, network))
        if record is None or record.network != network or record.key != key:
            return None
        try:
            self.path(record)
            self._bundle.check_file(record.plan)
        except BundleError:
            return None
        return record

    def place(self, key: EngineKey, network: str) -> Path:
        """Return where the engine of a network with this key lies, or is to be written."""
        return self.folder / f"{network}-{key.digest}.engine"

    def _record_path(self, key: EngineKey, network: str) -> Path:
        return self.place(key, network).with_suffix(".json")

    def path(self, record: EngineRecord) -> Path:
        """Return where an engine lies, after making sure that it is the one that was built.

        Raises:
            BundleError: It is missing, truncated or altered, or would lie outside the bundle.
        """
        path = self._bundle.inside(record.file.path)
        fix = self.remedy(record.key.kind, [])
        if not path.is_file() or path.stat().st_size != record.file.size:
            raise BundleError(f"the engine {path} is missing or truncated", fix=fix)
        if path.stat().st_mtime_ns != record.mtime_ns and sha256_of(path) != record.file.sha256:
            raise BundleError(f"the engine {path} was altered since it was built", fix=fix)
        return path

    def plans(self, record: EngineRecord) -> tuple[CompiledPlan, ...]:
        """Return what an engine was compiled to: one plan for every target and profile.

        Raises:
            BundleError: The file is missing or altered.
            EngineError: It is of another version.
        """
        self._bundle.check_file(record.plan)
        return plans_from_json(self._bundle.content(record.plan))

    def enter(
        self, key: EngineKey, network: str, engine: WrittenEngine, plans: tuple[CompiledPlan, ...]
    ) -> EngineRecord:
        """Write the plan and the record of an engine that lies at its place: the record last, which makes it known."""
        path, text = self.place(key, network), plans_to_json(plans)
        plan = path.with_suffix(_PLAN)
        with staged_file(plan) as staging:
            staging.write_bytes(text)
        inside = f"{self.folder.name}/"
        record = EngineRecord(
            key=key,
            network=network,
            file=StoredFile(inside + path.name, engine.size, engine.sha256),
            mtime_ns=path.stat().st_mtime_ns,
            plan=StoredFile(inside + plan.name, len(text), hashlib.sha256(text).hexdigest()),
            attention=engine.attention,
            seconds=round(engine.seconds, 2),
            peak_bytes=engine.memory.peak_bytes,
            private_bytes=engine.memory.private_bytes,
            built=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        )
        self.keep(record)
        return record

    def keep(self, record: EngineRecord) -> None:
        """Write an engine's record, which makes the engine known."""
        with staged_file(self._record_path(record.key, record.network)) as staging:
            staging.write_bytes(msgspec.json.format(msgspec.json.encode(record), indent=2) + b"\n")
