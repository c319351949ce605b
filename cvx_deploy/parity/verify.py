"""Whether a bundle is sound: every hash, every weight's place, every graph; and whether the engine loads it."""

import tempfile
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cvx_deploy.bundle.opened import Bundle
from cvx_deploy.bundle.safetensors import read_header
from cvx_deploy.engines.backend import Backend
from cvx_deploy.errors import BundleError, CvxError
from cvx_deploy.progress import Progress
from cvx_deploy.terminal import safe

if TYPE_CHECKING:
    from cvx_deploy.graph.check import WeightPlaces

_SAFETENSORS = ".safetensors"


@dataclass(frozen=True)
class FileReport:
    """A file that is no graph: its bytes, and what is wrong with it."""

    bytes: int
    findings: tuple[str, ...]


@dataclass(frozen=True)
class NetworkReport:
    """A network.

    Attributes:
        opset: Version of its operators; 0 when the graph cannot be read, likewise `nodes` and `weights`.
        nodes: How many nodes the graph has.
        weights: How many of its tensors lie in weight files.
        loaded: The video sizes that the engine loaded it at.
        kernels: How many of its layers the engine runs in few bits, by kernel; None unless it is quantized and loaded.
        findings: What is wrong with it.
    """

    opset: int
    nodes: int
    weights: int
    loaded: tuple[str, ...]
    findings: tuple[str, ...]
    kernels: dict[str, int] | None = None


@dataclass(frozen=True)
class Verification:
    """What was looked at in a bundle, and what was found.

    Attributes:
        notes: What could not be done.
    """

    path: Path
    tokenizer: FileReport
    weights: dict[str, FileReport]
    networks: dict[str, NetworkReport]
    notes: tuple[str, ...]

    @property
    def unsound(self) -> tuple[str, ...]:
        """The parts that something is wrong with."""
        parts: dict[str, FileReport | NetworkReport] = {"tokenizer": self.tokenizer, **self.weights, **self.networks}
        return tuple(name for name, part in parts.items() if part.findings)

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {"bundle": str(self.path), "sound": not self.unsound} | {
            key: value for key, value in asdict(self).items() if key != "path"
        }

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        yield from _part("tokenizer", f"{self.tokenizer.bytes:,} bytes", self.tokenizer.findings)
        for name, file in self.weights.items():
            yield from _part(name, f"{file.bytes:,} bytes", file.findings)
        for name, network in self.networks.items():
            facts = f"opset {network.opset}, {network.nodes:,} nodes, {network.weights:,} weights"
            loaded = f", loads at {', '.join(network.loaded)}" if network.loaded else ""
            kernels = "".join(f", {count} {kernel}" for kernel, count in (network.kernels or {}).items())
            yield from _part(name, facts + loaded + kernels, network.findings)
        yield from map(safe, self.notes)


def _part(name: str, facts: str, findings: tuple[str, ...]) -> Iterator[str]:
    yield f"{'WRONG' if findings else 'ok':<6} {safe(name)}: {safe(facts)}"
    yield from (f"         {safe(finding)}" for finding in findings)


def verify(bundle: Bundle, progress: Progress, *, load: bool = False, quick: bool = False) -> Verification:
    """Check everything in a bundle that can be checked without running it; nothing wrong stops it, all is listed.

    Needs `onnx`, and memory for one graph at a time: no weight is read but to be hashed.

    Args:
        bundle: As `Bundle.read` gives it: nothing in it is trusted yet.
        progress: Told the bytes hashed.
        load: Whether to load every sound network in ONNX Runtime, at every shape it is used at, and to see that its
            quantized layers run in few bits.
        quick: Whether to hash only those weight files whose time stamps are not the manifest's, as a run does.
    """
    manifest = bundle.manifest
    check_weight = bundle.weight_path if quick else bundle.check_weight
    weights = {
        name: FileReport(entry.size, _failures(partial(check_weight, name, progress)))
        for name, entry in manifest.weights.items()
    }
    tokenizer = FileReport(manifest.tokenizer.size, _failures(partial(bundle.check_file, manifest.tokenizer)))
    networks = _networks(bundle, progress, weights)
    notes: tuple[str, ...] = ()
    if load:
        with tempfile.TemporaryDirectory() as folder:
            networks, notes = _loaded(bundle, progress, weights, networks, Path(folder))
    return Verification(bundle.path, tokenizer, weights, networks, notes)


def _failures(check: Callable[[], object]) -> tuple[str, ...]:
    """Run one check and return what it says is wrong."""
    try:
        check()
    except CvxError as error:
        return (error.what,)
    except OSError as error:
        return (f"cannot read {error.filename}: {error.strerror}",)
    return ()


def _networks(bundle: Bundle, progress: Progress, weights: dict[str, FileReport]) -> dict[str, NetworkReport]:
    from cvx_deploy.graph.bounded import most_values
    from cvx_deploy.graph.check import check_graph

    most = max(map(most_values, bundle.shapes))
    places = {name: _places(bundle, name) for name in weights}
    reports = {}
    with progress.task("check graphs", len(bundle.manifest.networks)) as advance:
        for name, network in bundle.manifest.networks.items():
            findings = _failures(partial(bundle.check_file, network.file))
            report = NetworkReport(0, 0, 0, (), findings)
            path = _found(bundle, network.file.path)
            if path is not None:
                graph = check_graph(path, network, places, most)
                report = NetworkReport(graph.opset, graph.nodes, graph.weights, (), findings + graph.findings)
            reports[name] = report
            advance(1)
    return reports


def _found(bundle: Bundle, relative: str) -> Path | None:
    """Return a file of the bundle if it is there, even an altered one."""
    try:
        path = bundle.inside(relative)
    except BundleError:
        return None
    return path if path.is_file() else None


def _places(bundle: Bundle, name: str) -> "WeightPlaces":
    """Return what a weight file's header knows, as far as it can be read: `weights` says why it cannot."""
    from cvx_deploy.graph.check import Placed, WeightPlaces

    size = bundle.manifest.weights[name].size
    try:
        path = bundle.locate_weight(name)
        header = read_header(path, name) if path.suffix == _SAFETENSORS else None
    except CvxError:
        header = None
    if header is None:
        return WeightPlaces(size, None)
    tensors: defaultdict[tuple[int, int], list[Placed]] = defaultdict(list)
    for tensor in header.values():
        tensors[tensor.offset, tensor.nbytes].append((tensor.dtype, tensor.shape))
    return WeightPlaces(size, dict(tensors))


def _loaded(
    bundle: Bundle,
    progress: Progress,
    weights: Mapping[str, FileReport],
    networks: dict[str, NetworkReport],
    folder: Path,
) -> tuple[dict[str, NetworkReport], tuple[str, ...]]:
    """Load every network that is sound so far at every shape, and return the reports with what came of it."""
    from cvx_deploy.engines.onnxruntime.backend import OrtBackend
    from cvx_deploy.engines.onnxruntime.kernels import quantized_kernels, shortfall

    try:
        backend = OrtBackend(bundle, progress=progress, optimized=folder)
    except CvxError as error:
        return networks, (f"not loaded: {error.what}",)
    networks = dict(networks)
    seen: set[Hashable] = set()
    for entry in bundle.manifest.shapes:
        backend.bundle = bundle.at(entry.shape)
        for role, name in entry.networks.items():
            used = bundle.manifest.networks[name].weights
            if networks[name].findings or any(weights[weight].findings for weight in used):
                continue
            with progress.task(f"load {name} at {entry.shape}"):
                failures = _failures(partial(_load, backend, role, name, seen))
            loaded = networks[name].loaded + (() if failures else (str(entry.shape),))
            networks[name] = replace(networks[name], loaded=loaded, findings=failures)
            quantization = bundle.manifest.networks[name].quantization
            if quantization is not None and not failures:
                kernels = quantized_kernels(folder / f"{role}.onnx", quantization.scheme)
                findings = shortfall(kernels, quantization)
                networks[name] = replace(networks[name], kernels=kernels, findings=findings)
    return networks, ()


def _load(backend: Backend, role: str, name: str, seen: set[Hashable]) -> None:
    """Load a network at the shape the backend's bundle is seen at, unless it was with inputs of the same sizes."""
    shape, spatial = backend.bundle.shape, backend.bundle.manifest.vae.spatial
    sizes = {
        "batch": 2 if role == "transformer" else 1,  # guidance takes a pair
        "latent_height": shape.height // spatial,
        "latent_width": shape.width // spatial,
    }
    inputs = tuple(spec.resolve(sizes) for spec in backend.bundle.network(role).inputs)
    if (name, inputs) not in seen:
        with backend.load(role, sizes):
            seen.add((name, inputs))
