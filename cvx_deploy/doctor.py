"""What this machine can do with the bundles that are here, and what is in the way, each with its cure."""

import importlib.metadata
import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from cvx_deploy import __version__
from cvx_deploy.bundle.opened import MANIFEST, Bundle
from cvx_deploy.engines.cuda import CudaPython, Gpu
from cvx_deploy.engines.registry import SPECS
from cvx_deploy.engines.tensorrt.libraries import ENGINE_KINDS, Library, load_library
from cvx_deploy.engines.tensorrt.store import EngineStore, Platform
from cvx_deploy.errors import BundleError, CvxError, EngineError
from cvx_deploy.files import free_space, nearest_folder
from cvx_deploy.install import pip_install
from cvx_deploy.measure.cpu import overflows_in_int8
from cvx_deploy.miniatures import MINIATURES, miniature
from cvx_deploy.terminal import LONGEST_PATH, safe

_PACKAGES = (
    "onnxruntime",
    "onnxruntime-gpu",
    "openvino",
    "tensorrt",
    "tensorrt-rtx-cu13",
    "cuda-python",
    "torch",
    "diffusers",
    "transformers",
)
_LEAST_DISK = 10 * 10**9

State = Literal["ok", "note", "problem"]


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        state: ``note`` for what is in nobody's way, ``problem`` for what is.
        subject: What was looked at: python, gpu, tensorrt-rtx, bundle 5b, ...
        what: What was found.
        fix: How to mend it; empty where nothing needs mending.
    """

    state: State
    subject: str
    what: str
    fix: str = ""

    def __str__(self) -> str:
        cure = f". fix: {safe(self.fix, LONGEST_PATH)}" if self.fix else ""
        return f"{self.state:<8}{safe(self.subject)}: {safe(self.what)}{cure}"


@dataclass(frozen=True)
class Diagnosis:
    """Everything that was found."""

    findings: tuple[Check, ...]

    @property
    def problems(self) -> tuple[Check, ...]:
        """What is in somebody's way."""
        return tuple(finding for finding in self.findings if finding.state == "problem")

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain values."""
        return {"ok": not self.problems, "findings": [asdict(finding) for finding in self.findings]}

    def __str__(self) -> str:
        return "\n".join(map(str, self.findings))


def diagnose(engines_dir: Path) -> Diagnosis:
    """Look at the machine, the engine kinds, and every bundle in a folder.

    Args:
        engines_dir: Where bundles live by their names.
    """
    gpus, no_gpu = _gpus()
    findings = [
        *_versions(),
        *_machine(engines_dir),
        *([Check("note", "gpu", no_gpu.what, no_gpu.fix)] if no_gpu else map(_gpu_finding, gpus)),
        *_engine_kinds(),
    ]
    here = [Platform.of(gpu) for gpu in gpus]
    usable = [found for found in map(_library, ENGINE_KINDS) if isinstance(found, Library)]
    for place in _bundles(engines_dir):
        findings += _bundle(place, usable, here)
    return Diagnosis(tuple(findings))


def _versions() -> Iterator[Check]:
    yield Check("ok", "cvx-deploy", __version__)
    yield Check("ok", "python", f"{platform.python_version()} on {platform.platform()}")
    for name in _PACKAGES:
        try:
            yield Check("ok", name, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            continue


def _machine(engines_dir: Path) -> Iterator[Check]:
    try:
        import psutil

        memory = psutil.virtual_memory()
        yield Check("ok", "memory", f"{memory.available / 1e9:.1f} of {memory.total / 1e9:.1f} GB available")
    except ImportError:
        yield Check("note", "memory", "unknown without psutil", pip_install("tensorrt-rtx"))
    free = free_space(engines_dir)
    enough = free >= _LEAST_DISK
    yield Check(
        "ok" if enough else "problem",
        "disk",
        f"{free / 1e9:.1f} GB free at {nearest_folder(engines_dir)}",
        "" if enough else "make room: an engine is as large as its weights, 11 GB for a 5b transformer in bf16",
    )


def _gpus() -> tuple[list[Gpu], EngineError | None]:
    try:
        cuda = CudaPython()
        return [cuda.gpu(device) for device in range(cuda.count())], None
    except EngineError as error:
        return [], error


def _gpu_finding(gpu: Gpu) -> Check:
    return Check("ok", "gpu", f"{gpu.name}, {gpu.compute_capability}, {gpu.memory / 1e9:.1f} GB, driver {gpu.driver}")


def _engine_kinds() -> Iterator[Check]:
    for spec in SPECS.values():
        probe = spec.probe()
        yield Check("ok" if probe.runs else "note", spec.name, probe.what, probe.fix)


def _library(kind: Any) -> Library | EngineError:
    try:
        return load_library(kind)
    except EngineError as error:
        return error


def _bundles(engines_dir: Path) -> Iterator[Path]:
    """Yield every bundle in the folder, and the package's own that nobody has exported."""
    named = sorted(path.parent for path in engines_dir.glob(f"*/{MANIFEST}"))
    yield from named
    yield from (miniature(name) for name in MINIATURES if name not in {path.name for path in named})


def _bundle(place: Path, libraries: list[Library], gpus: list[Platform]) -> Iterator[Check]:
    subject = f"bundle {place.name}"
    try:
        bundle = Bundle.open(place)
        for name in bundle.manifest.weights:
            bundle.locate_weight(name)
    except CvxError as error:
        yield Check("problem", subject, error.what, error.fix)
        return
    shapes = ", ".join(map(str, bundle.shapes))
    yield Check("ok", subject, f"{bundle.manifest.model}, {bundle.manifest.precision}, {shapes}, at {place}")
    if "bf16" in bundle.manifest.computes_in:
        yield Check(
            "note",
            subject,
            "ONNX Runtime has no bf16 on the CPU",
            "use --engine openvino, or export with --precision fp32",
        )
    if "int8" in bundle.manifest.multiplies_in and overflows_in_int8():
        yield Check(
            "note",
            subject,
            "this CPU has no VNNI: in OpenVINO int8 would overflow",
            "use --engine onnxruntime, which multiplies another way",
        )
    if "fp8" in bundle.manifest.multiplies_in:
        yield Check(
            "note",
            subject,
            "no CPU multiplies in fp8",
            "use --engine tensorrt-rtx or tensorrt on a GPU from sm89 on, or export with --precision int8/fp32",
        )
    for library in libraries:
        yield from _engines(bundle, subject, library, gpus)


def _engines(bundle: Bundle, subject: str, library: Library, gpus: list[Platform]) -> Iterator[Check]:
    """Say of the engines of one kind whether each fits, and which part of its key differs if it does not."""
    store = EngineStore(bundle)
    records = [record for record in store.records() if record.key.kind == library.kind]
    for record in records:
        places: list[Platform | None] = [*gpus] or [None]
        misfits = [record.key.misfits(store.wanted(record.network, library.version, gpu)) for gpu in places]
        where = f"{library.kind} engine of {record.network} for {', '.join(record.key.targets)}"
        try:
            store.path(record)
        except BundleError as error:
            yield Check("problem", subject, error.what, error.fix)
            continue
        if all(misfits):
            differs = "; ".join(misfits[0])
            yield Check("problem", subject, f"{where} does not fit: {differs}", store.remedy(library.kind, gpus))
        elif gpus:
            yield Check("ok", subject, f"{where} fits this GPU, its driver and the library")
        else:
            yield Check("note", subject, f"{where} is whole; there is no GPU here to run it on")
    built = {record.network for record in records}
    missing = [name for name in bundle.manifest.networks if name not in built]
    if records and missing:
        what = f"there is no {library.kind} engine of {', '.join(missing)}"
        yield Check("problem", subject, what, store.remedy(library.kind, gpus))
