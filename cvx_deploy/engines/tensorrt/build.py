"""A bundle's networks to engines: which are needed, which are there already, and what each build came to.

Every engine is looked up under its key first, so that a build that was interrupted goes on where it stopped, and a
second one does nothing.
"""

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from cvx_deploy.bundle.opened import Bundle
from cvx_deploy.engines.tensorrt.compile import (
    BuildSettings,
    BuiltFile,
    UnfusedError,
    compiled_plans,
    make_config,
    make_logger,
    monitored,
    timing_cache,
    timing_cache_path,
    write_engine,
)
from cvx_deploy.engines.tensorrt.gate import Findings, facts_from_graph, judge
from cvx_deploy.engines.tensorrt.libraries import Library
from cvx_deploy.engines.tensorrt.memory import require_memory, weight_bytes_of
from cvx_deploy.engines.tensorrt.network import Attention, attention_layers, onnx_model, parsed_network
from cvx_deploy.engines.tensorrt.store import (
    EngineKey,
    EngineRecord,
    EngineStore,
    Platform,
    Profile,
    WrittenEngine,
    gpu_targets,
)
from cvx_deploy.errors import BundleError, EngineError
from cvx_deploy.files import require_space, staged_file
from cvx_deploy.measure.memory import MemoryWatch
from cvx_deploy.miniatures import is_packaged
from cvx_deploy.progress import Progress
from cvx_deploy.shape import Shape

_FIRST_WITH_FP8 = 89
_DENOISER = "transformer"


@dataclass(frozen=True)
class BuildRequest:
    """What to build.

    Attributes:
        targets: Compute capabilities, such as sm89, for a library that compiles ahead of time.
        platform: The GPU that is here, if one is.
        networks: Which of the bundle's; none for all.
        batch: Smallest and largest batch of the transformer: guidance needs 2, none needs 1.
        vae_tiling: Whether the VAE is built for the tiles of tiled runs, rather than for whole frames.
        force: Whether engines that are there already are built again.
    """

    targets: tuple[str, ...] = ()
    platform: Platform | None = None
    networks: tuple[str, ...] = ()
    batch: tuple[int, int] = (1, 2)
    settings: BuildSettings = field(default_factory=BuildSettings)
    vae_tiling: bool = False
    force: bool = False


@dataclass(frozen=True)
class Job:
    """One engine to be had: a network, and the sizes it must take."""

    network: str
    role: str
    profile: Profile


@dataclass(frozen=True)
class Outcome:
    """An engine that is there now.

    Attributes:
        role: What the network is in the pipeline.
        reused: Whether it was there before.
    """

    record: EngineRecord
    role: str
    reused: bool


def build(library: Library, bundle: Bundle, request: BuildRequest, progress: Progress) -> Iterator[Outcome]:
    """Build what is missing, one engine after the other, and yield each as it is there.

    Raises:
        EngineError: The machine cannot build it, or the library refuses a network.
        BundleError: A file of the bundle is missing or altered.
        OutputError: An engine cannot be written.
    """
    if is_packaged(bundle.path):
        name = bundle.path.name
        raise BundleError(
            f"{bundle.path} is a part of the package, where nothing is written",
            fix=f"export it first: cvx-deploy export --model {name}",
        )
    store = EngineStore(bundle)
    todo = jobs(bundle, request)
    _require_fp8(bundle, todo, _targets(library, request))
    keys = [_key(library, bundle, job, request) for job in todo]
    found = [None if request.force else store.reuse(key, job.network) for key, job in zip(keys, todo, strict=True)]
    missing = {job.network for job, record in zip(todo, found, strict=True) if record is None}
    require_memory(((name, weight_bytes_of(bundle, name)) for name in sorted(missing)), library.kind, bundle)
    compiler = _Compiler(library, bundle, request, progress)
    for job, key, record in zip(todo, keys, found, strict=True):
        if record is not None:
            yield Outcome(record, job.role, reused=True)
        else:
            yield Outcome(compiler.build(store, job, key), job.role, reused=False)


def _require_fp8(bundle: Bundle, todo: list[Job], targets: tuple[str, ...]) -> None:
    """Raise EngineError where a target has no fp8 instructions: it would multiply in 16 bits, and say nothing."""
    without = [target for target in targets if target.startswith("sm") and _number(target) < _FIRST_WITH_FP8]
    for job in todo:
        quantization = bundle.manifest.networks[job.network].quantization
        if without and quantization is not None and (quantization.scheme == "fp8" or quantization.attention):
            raise EngineError(
                f"{job.network} of {bundle.path} multiplies in fp8, which {without[0]} has no instructions for",
                fix="export with --precision int8, int8wo or bf16, or name targets from sm89 (Ada) on",
            )


def judged(bundle: Bundle, outcome: Outcome) -> list[Findings]:
    """Return the fusion gate's findings, for every target and profile of an engine."""
    graph = onnx_model(bundle, outcome.record.network).graph
    precision = bundle.manifest.networks[outcome.record.network].precision
    facts = facts_from_graph(graph, outcome.role, bundle.family.expectation(outcome.role), precision)
    return [judge(plan, facts) for plan in EngineStore(bundle).plans(outcome.record)]


def jobs(bundle: Bundle, request: BuildRequest) -> list[Job]:
    """Return an engine's job for every network of every shape; shapes that need the same engine share it.

    Raises:
        EngineError: A network was asked for that the bundle has not.
    """
    unknown = set(request.networks) - set(bundle.manifest.networks)
    if unknown:
        have = ", ".join(bundle.manifest.networks)
        raise EngineError(f"{bundle.path} has no network {min(unknown)}", fix=f"name some of {have}")
    found: list[Job] = []
    for entry in bundle.manifest.shapes:
        for role, name in entry.networks.items():
            if request.networks and name not in request.networks:
                continue
            for profile in _profiles(bundle, role, entry.shape, request):
                symbols = set().union(*(spec.symbols for spec in bundle.manifest.networks[name].inputs))
                job = Job(name, role, {symbol: extent for symbol, extent in profile.items() if symbol in symbols})
                if job not in found:
                    found.append(job)
    return found


def _profiles(bundle: Bundle, role: str, shape: Shape, request: BuildRequest) -> Iterator[Profile]:
    """Yield the sizes that a role's network must take at a shape: one set each engine."""
    vae, cut = bundle.manifest.vae, bundle.family.vae
    half = cut.encoder(vae) if role.startswith("vae_encoder") else cut.decoder
    tiled = request.vae_tiling and role.startswith("vae")
    # The text encoder takes one prompt at a time.
    least, most = request.batch if role == _DENOISER else (1, 1)
    for height, width in cut.planes(vae, half, shape, tiled):
        yield {
            "batch": (least, most, most),
            "latent_height": (height, height, height),
            "latent_width": (width, width, width),
        }


def _key(library: Library, bundle: Bundle, job: Job, request: BuildRequest) -> EngineKey:
    network = bundle.manifest.networks[job.network]
    return EngineKey(
        library.kind,
        network.file.sha256,
        {name: bundle.manifest.weights[name].sha256 for name in network.weights},
        job.profile,
        asdict(request.settings),
        library.version,
        _targets(library, request),
    )


def _targets(library: Library, request: BuildRequest) -> tuple[str, ...]:
    """Return what the engines are for, or say what is missing."""
    if library.ahead_of_time:
        if request.targets:
            _check_targets(library, request.targets)
            return tuple(sorted(set(request.targets), key=_number))
        if request.platform is None:
            raise EngineError(
                "there is no GPU here to build for", fix="say which, with --target sm89 (or rtx4090), once or more"
            )
        library.check_runs_on(request.platform.capability)
        return (request.platform.capability,)
    if request.targets:
        raise EngineError(
            f"{library.kind} builds for the GPU that is here alone",
            fix="leave --target out, or build with --engine tensorrt-rtx",
        )
    if request.platform is None:
        raise EngineError(
            f"{library.kind} builds on the GPU it will run on, and there is none here",
            fix="build on that machine, or with --engine tensorrt-rtx --target sm89, which needs no GPU",
        )
    if request.settings.hardware_compatibility == "same-capability":
        return (request.platform.capability,)
    return gpu_targets(request.platform)


def _check_targets(library: Library, targets: tuple[str, ...]) -> None:
    known = library.capabilities or set()
    for target in targets:
        if target not in known:
            can = ", ".join(sorted((name for name in known if _number(name) > 1), key=_number))
            raise EngineError(
                f"{library.kind} {library.version} compiles for {can}, not for {target}",
                fix="name one of these, or build on the GPU itself with --engine tensorrt",
            )


def _number(capability: str) -> int:
    return int(capability.removeprefix("sm"))


@dataclass(frozen=True)
class _Compiler:
    """What every build of one command has in common."""

    library: Library
    bundle: Bundle
    request: BuildRequest
    progress: Progress

    def build(self, store: EngineStore, job: Job, key: EngineKey) -> EngineRecord:
        """Build one engine and write it, its plan and its record: the record last, which makes it known."""
        path = store.place(key, job.network)
        require_space(self.bundle.path, weight_bytes_of(self.bundle, job.network))
        start = time.perf_counter()
        with MemoryWatch() as memory, staged_file(path) as staging:
            built, attention = self._compiled(job, key, staging)
            plans = compiled_plans(self.library, built.messages, staging, key.targets)
        engine = WrittenEngine(built.size, built.sha256, attention, time.perf_counter() - start, memory)
        return store.enter(key, job.network, engine, plans)

    def _compiled(self, job: Job, key: EngineKey, path: Path) -> tuple[BuiltFile, Attention]:
        """Compile a network; attention that no fused kernel takes is taken apart, and that is said.

        Fused attention exists in 16 bits and less; in fp32 the operator is declared decomposable from the start.
        """
        decomposed = self.bundle.manifest.networks[job.network].precision == "fp32"
        try:
            return self._compiled_once(job, key, path, decomposed=decomposed)
        except UnfusedError as error:
            self.progress.note(f"{job.network}: {error.what}; it is compiled from its parts instead")
            path.unlink(missing_ok=True)
            return self._compiled_once(job, key, path, decomposed=True)

    def _compiled_once(self, job: Job, key: EngineKey, path: Path, *, decomposed: bool) -> tuple[BuiltFile, Attention]:
        library, bundle, progress = self.library, self.bundle, self.progress
        logger = make_logger(library)
        builder = library.module.Builder(logger)
        with parsed_network(library, builder, bundle, job.network, job.profile, logger, progress) as network:
            attention = attention_layers(library.module, network.definition)
            for layer in attention:
                layer.decomposable = decomposed
            described = bundle.manifest.networks[job.network]
            targets = [_number(target) for target in key.targets] if library.ahead_of_time else []
            config = make_config(library, builder, described, job.profile, self.request.settings, targets)
            timings = None if library.ahead_of_time else timing_cache_path(library, key.targets[0])
            with monitored(library, config, job.network, progress), timing_cache(config, timings):
                built = write_engine(library, builder, network, config, logger, path)
        form: Attention = "none" if not attention else "decomposed" if decomposed else "fused"
        return built, form
