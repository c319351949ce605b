"""One network to one engine file: builder settings, progress, the log the compiled plan is read from."""

import hashlib
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

from cvx_deploy.bundle.schema import Network
from cvx_deploy.engines.tensorrt.compiled_plan import CompiledPlan, plans_from_inspector, plans_from_messages
from cvx_deploy.engines.tensorrt.engine import EngineLoader
from cvx_deploy.engines.tensorrt.libraries import Library
from cvx_deploy.engines.tensorrt.network import ParsedNetwork
from cvx_deploy.engines.tensorrt.store import Profile
from cvx_deploy.errors import EngineError
from cvx_deploy.files import cache_folder, staged_file
from cvx_deploy.progress import Advance, Progress

HardwareCompatibility = Literal["none", "ampere-plus", "same-capability"]


@dataclass(frozen=True)
class BuildSettings:
    """How engines are built; all of it is part of an engine's key.

    Attributes:
        optimization_level: 0 (quickest build) to 5 (fastest engine); None for the library's own.
        workspace: Bytes a kernel may use besides its inputs and outputs; None for all there are.
        hardware_compatibility: Which other GPUs an engine of the full library runs on.
        weight_streaming: Whether weights may stay in host memory and be fetched as they are needed.
        refit: Whether weights can be exchanged in the built engine.
        strip_weights: Whether the engine is kept without the weights that a refit can bring back.
    """

    optimization_level: int | None = None
    workspace: int | None = None
    hardware_compatibility: HardwareCompatibility = "none"
    weight_streaming: bool = False
    refit: bool = False
    strip_weights: bool = False


class UnfusedError(EngineError):
    """An attention operator that no fused kernel takes, and that was not declared decomposable."""


@dataclass(frozen=True)
class BuiltFile:
    """A written engine: its bytes, its hash, and every message of its build."""

    size: int
    sha256: str
    messages: list[str]


def make_logger(library: Library) -> Any:
    """Return a logger that keeps every message, since the compiled plan is only told there."""
    api = library.module

    class Messages(api.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.texts: list[str] = []
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (api.ILogger.Severity.ERROR, api.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(message)
            self.texts.append(message)

    return Messages()


def write_engine(
    library: Library,
    builder: Any,
    network: ParsedNetwork,
    config: Any,
    logger: Any,
    path: Path,
) -> BuiltFile:
    """Compile a network into a new file, piece by piece as the library hands it over.

    Raises:
        EngineError: The library cannot compile it; its own words.
        KeyboardInterrupt: The build was interrupted.
    """
    with path.open("xb") as file:
        writer = _writer(library, file)
        done = builder.build_serialized_network_to_stream(network.definition, config, writer)
        if writer.failure is not None:
            raise writer.failure
    monitor = config.progress_monitor
    if monitor is not None and monitor.interrupted:
        raise KeyboardInterrupt
    if not done:
        raise _failure(library, logger)
    return BuiltFile(writer.size, writer.digest.hexdigest(), logger.texts)


def make_config(
    library: Library, builder: Any, described: Network, profile: Profile, settings: BuildSettings, targets: list[int]
) -> Any:
    """Return the builder's config for a network.

    Args:
        library: Whose builder it is.
        builder: The ``Builder``.
        described: The network's interface.
        profile: The sizes it must take.
        settings: How to build.
        targets: Compute capabilities, such as 89, to compile for; none for the GPU that is here.
    """
    api = library.module
    config = builder.create_builder_config()
    config.profiling_verbosity = api.ProfilingVerbosity.DETAILED
    if settings.optimization_level is not None:
        config.builder_optimization_level = settings.optimization_level
    if settings.workspace is not None:
        config.set_memory_pool_limit(api.MemoryPoolType.WORKSPACE, settings.workspace)
    _set_flags(api, config, settings)
    _set_targets(api, config, targets)
    _set_profile(builder, config, described, profile)
    return config


def _set_flags(api: Any, config: Any, settings: BuildSettings) -> None:
    wanted = {
        "WEIGHT_STREAMING": settings.weight_streaming,
        "REFIT": settings.refit,
        "STRIP_PLAN": settings.strip_weights,
    }
    for name, on in wanted.items():
        if on:
            config.set_flag(getattr(api.BuilderFlag, name))
    if settings.hardware_compatibility != "none":
        levels = {"ampere-plus": "AMPERE_PLUS", "same-capability": "SAME_COMPUTE_CAPABILITY"}
        level = levels[settings.hardware_compatibility]
        config.hardware_compatibility_level = getattr(api.HardwareCompatibilityLevel, level)


def _set_targets(api: Any, config: Any, targets: list[int]) -> None:
    if not targets:
        return
    config.num_compute_capabilities = len(targets)
    for index, target in enumerate(targets):
        config.set_compute_capability(api.ComputeCapability(target), index)


def _set_profile(builder: Any, config: Any, described: Network, profile: Profile) -> None:
    """Give the config the range of every input that has one."""
    fixed = {symbol for symbol, (least, _, most) in profile.items() if least == most}
    ranges = builder.create_optimization_profile()
    varies = False
    for spec in described.inputs:
        symbols = spec.symbols - fixed
        if symbols:
            varies = True
            sizes = [{symbol: extent[which] for symbol, extent in profile.items()} for which in range(3)]
            ranges.set_shape(spec.name, *(spec.resolve(size) for size in sizes))
    if varies:
        config.add_optimization_profile(ranges)


def timing_cache_path(library: Library, gpu: str) -> Path:
    """Return where the timings of kernels on one kind of GPU are kept, for the builds to come."""
    name = re.sub(r"\W+", "-", f"{gpu} {library.kind} {library.version}").strip("-").lower()
    return cache_folder("timing") / f"{name}.cache"


@contextmanager
def timing_cache(config: Any, path: Path | None) -> Iterator[None]:
    """Let a build use what earlier ones timed, and keep what it times; None for a library that times nothing."""
    if path is None:
        yield
        return
    # What another GPU or version left is refused by the library, and an empty cache begun in its place.
    cache = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
    config.set_timing_cache(cache, False)
    yield
    with staged_file(path) as staging:
        staging.write_bytes(bytes(cache.serialize()))


def compiled_plans(
    library: Library, messages: list[str], path: Path, targets: tuple[str, ...]
) -> tuple[CompiledPlan, ...]:
    """Return the compiled plans of an engine, from its build's messages, or from the engine where a GPU can open it.

    Raises:
        EngineError: Neither tells them.
    """
    try:
        return plans_from_messages(messages, targets)
    except EngineError:
        if library.ahead_of_time:
            raise
    engine = EngineLoader(library, targets[0], note=lambda _: None).deserialize(path, "the new engine")
    inspector = engine.create_engine_inspector()
    information = inspector and inspector.get_engine_information(library.module.LayerInformationFormat.JSON)
    if not information:
        raise EngineError(f"{library.kind} does not tell what {path} was compiled to", fix=_REPORT)
    return plans_from_inspector(information, targets)


@contextmanager
def monitored(library: Library, config: Any, name: str, progress: Progress) -> Iterator[None]:
    """Show the build's phases while the block lasts; Ctrl-C ends the build at its next step."""
    with ExitStack() as shown:
        monitor = _monitor(library, name, progress, shown)
        config.progress_monitor = monitor
        yield


def _monitor(library: Library, name: str, progress: Progress, shown: ExitStack) -> Any:
    class Phases(library.module.IProgressMonitor):  # type: ignore[misc, name-defined]
        """Outermost phases as bars, one after the other; what happens inside them moves no bar of its own."""

        def __init__(self) -> None:
            super().__init__()
            self.interrupted = False
            self._bars: dict[str, tuple[ExitStack, Advance, int]] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if parent_phase is None:
                bar = shown.enter_context(ExitStack())
                self._bars[phase_name] = bar, bar.enter_context(progress.task(f"build {name}", num_steps)), 0

        def step_complete(self, phase_name: str, step: int) -> bool:
            try:
                if phase_name in self._bars:
                    bar, advance, done = self._bars[phase_name]
                    advance(step + 1 - done)
                    self._bars[phase_name] = bar, advance, step + 1
            except KeyboardInterrupt:
                self.interrupted = True
            return not self.interrupted

        def phase_finish(self, phase_name: str) -> None:
            if phase_name in self._bars:
                self._bars.pop(phase_name)[0].close()

    return Phases()


def _writer(library: Library, file: BinaryIO) -> Any:
    class Writer(library.module.IStreamWriter):  # type: ignore[misc, name-defined]
        """Takes the engine's bytes, hashes them, and remembers what the disk refused."""

        def __init__(self) -> None:
            super().__init__()
            self.size, self.digest = 0, hashlib.sha256()
            self.failure: OSError | None = None

        def write(self, data: bytes) -> int:
            try:
                file.write(data)
            except OSError as error:
                self.failure = error
                return 0
            self.digest.update(data)
            self.size += len(data)
            return len(data)

    return Writer()


_REPORT = "run it with --engine onnxruntime, and report this with the model's name"
# What an error says, and what would help.
_REMEDIES = {
    r"out of ?memory": "free memory, or build with a lower --optimization-level or a smaller --workspace",
    r"Cannot compile for target": "name a newer --target, or export with another --precision",
    r"CUDA": "build on a machine with the GPU; engines to be refitted, or without weights, need one even ahead of time",
}


def _failure(library: Library, logger: Any) -> EngineError:
    """Return the failure that the library's errors stand for: the first is the cause, later ones follow from it."""
    text = " ".join(logger.errors)
    if "not supported by a dedicated kernel" in text:
        return UnfusedError("no fused attention kernel takes its shapes and types", fix="export in bf16 or fp16")
    cause = " ".join((logger.errors or ["it gives no reason"])[0].split())
    known = (fix for words, fix in _REMEDIES.items() if re.search(words, text, re.IGNORECASE))
    report = (
        f"run it with --engine onnxruntime, and report what cvx-deploy check --engine {library.kind} --reduce leaves"
    )
    fix = next(known, report)
    return EngineError(f"{library.kind} {library.version} cannot compile it: {cause}", fix=fix)
