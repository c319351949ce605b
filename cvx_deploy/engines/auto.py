"""`--engine auto`: the fastest engine that this machine has for a bundle.

A GPU's engine goes before a CPU's: it is many times as fast, and one that was compiled was compiled to be used. Between
engines on CPUs a short probe decides: one block of the bundle's own transformer, at its own size and precision, run by
each. What it found is kept in the user's cache for as long as the CPU, the engines' versions and the network stay what
they are.
"""

import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from cvx_deploy.engines.registry import ENGINES, SPECS, engine_spec, open_backend
from cvx_deploy.engines.spec import DEFAULT_OPTIONS, EngineName, EngineOptions, EngineSpec, Needed
from cvx_deploy.errors import CvxError, EngineError
from cvx_deploy.kept import Kept
from cvx_deploy.measure.cpu import cpu_name, instructions
from cvx_deploy.progress import Progress, SilentProgress

if TYPE_CHECKING:
    import onnx

    from cvx_deploy.bundle.opened import Bundle

AUTO: Final = "auto"
CHOICES: Final = (AUTO, *ENGINES)
VARIABLE: Final = "CVX_ENGINE"
"""The environment variable that says what auto means."""
_KEPT = Kept("probes", "engines.json")
_TRANSFORMER = "transformer"
_LEAST, _MOST = 3, 15  # runs of a block, after one that does not count
_SECONDS = 0.2  # in which as many runs as fit are made
_LONG = 2.0  # seconds of a run beyond which one is enough


@dataclass(frozen=True)
class Choice:
    """An engine, and why it is this one."""

    engine: EngineName
    why: str

    def __str__(self) -> str:
        return f"{self.engine}: {self.why}"


def chosen(
    engine: EngineName,
    bundle: "Bundle",
    options: EngineOptions = DEFAULT_OPTIONS,
    needed: Needed = (),
    *,
    devices: Sequence[int] = (),
    fits: Callable[[EngineName], str] = lambda _: "",
    progress: Progress | None = None,
) -> Choice:
    """Return the engine that a name means for a bundle: itself, unless it is ``auto``; a note says which, and why.

    Args:
        engine: What was asked for.
        bundle: What is to be run, seen at one of its shapes.
        options: How; only engines that take what is given are chosen from.
        needed: Role and sizes of every network that will be loaded.
        devices: The GPUs that were named.
        fits: Says why an engine would take too much memory; nothing where it would not.
        progress: Told of the choice.

    Raises:
        EngineError: No engine of this machine can run the bundle; for each, why not.
    """
    if engine != AUTO:
        return Choice(engine, "it was asked for")
    if named := os.environ.get(VARIABLE, "").strip():
        return Choice(engine_spec(named).name, f"{VARIABLE} says so")
    progress = progress or SilentProgress()
    wanted = (options.given() | ({"device"} if devices else set())) - {"residency"}
    obstacles = {name: _obstacle(spec, bundle, options, needed, wanted) for name, spec in SPECS.items()}
    found = _best(obstacles, bundle, options, fits, progress)
    progress.note(f"engine {found}")
    return found


def _best(
    obstacles: dict[EngineName, str],
    bundle: "Bundle",
    options: EngineOptions,
    fits: Callable[[EngineName], str],
    progress: Progress,
) -> Choice:
    """Return the fastest engine that nothing stands in the way of; `obstacles` says of each what does."""
    able = [SPECS[name] for name, obstacle in obstacles.items() if not obstacle]
    if not able:
        told = "; ".join(f"{name}: {why}" for name, why in obstacles.items())
        raise EngineError(
            f"no engine here can run {bundle.path} ({told})",
            fix="run: cvx-deploy doctor, or export with --precision fp32",
        )
    obstacles = obstacles | {spec.name: fits(spec.name) for spec in able}
    first, able = able[0].name, [spec for spec in able if not obstacles[spec.name]]
    if not able:  # the run is refused, and says what would fit
        return Choice(first, obstacles[first])
    on_gpu = sorted((spec for spec in able if spec.on_gpu), key=lambda spec: not spec.compiled)
    if on_gpu:
        how = "compiled for the GPU here" if on_gpu[0].compiled else "it runs on the GPU here"
        return Choice(on_gpu[0].name, how)
    if len(able) == 1:
        others = "; ".join(f"{name}: {why}" for name, why in obstacles.items() if not SPECS[name].on_gpu and why)
        return Choice(able[0].name, f"the one engine that can run this bundle here ({others})")
    return _fastest(able, bundle, options, progress)


def _obstacle(spec: EngineSpec, bundle: "Bundle", options: EngineOptions, needed: Needed, wanted: set[str]) -> str:
    """Return why an engine cannot run a bundle on this machine; empty where it can."""
    if wanted - spec.takes:
        return f"it takes no {', '.join(sorted(wanted - spec.takes))}"
    try:
        spec.version()
        if obstacle := spec.obstacle(bundle.manifest):
            return obstacle
        if spec.on_gpu and not (probe := spec.probe()).runs:
            return probe.what
        if spec.on_gpu:  # opening finds out whether what was compiled fits this GPU
            with open_backend(spec.name, bundle, options, needed=needed):
                pass
    except EngineError as error:
        return error.what
    return ""


def _fastest(able: list[EngineSpec], bundle: "Bundle", options: EngineOptions, progress: Progress) -> Choice:
    """Return the fastest of some engines on this CPU, as a probe found now or earlier."""
    network = bundle.network(_TRANSFORMER)
    versions = [f"{spec.name} {spec.version()}" for spec in able]
    key = "|".join(
        [cpu_name(), *instructions(), f"{options.threads or os.cpu_count()}", *versions, network.file.sha256]
    )
    seconds = _remembered(key, able)
    if seconds is None:
        with progress.task("find the fastest engine"):
            seconds = _probe(able, bundle, options)
        _KEPT.put(key, json.dumps(seconds))
    ran = {name: taken for name, taken in seconds.items() if taken is not None}
    if not ran:
        return Choice(able[0].name, "no engine could be probed")
    best, *others = sorted(ran, key=lambda name: ran[name])
    beside = ", ".join(f"{ran[name] * 1000:.3g} ms in {name}" for name in others)
    return Choice(
        best, f"a block of the transformer takes {ran[best] * 1000:.3g} ms" + (f", {beside}" if beside else "")
    )


def _remembered(key: str, able: list[EngineSpec]) -> dict[str, float | None] | None:
    with suppress(ValueError):
        found = json.loads(_KEPT.get(key) or "")
        names = {spec.name for spec in able}
        if isinstance(found, dict) and found.keys() == names and all(map(_is_seconds, found.values())):
            return found
    return None


def _is_seconds(value: Any) -> bool:
    return value is None or (isinstance(value, float) and 0 < value < float("inf"))


def _probe(able: list[EngineSpec], bundle: "Bundle", options: EngineOptions) -> dict[str, float | None]:
    """Return how long a block of the transformer takes on each engine; None on one that fails."""
    with tempfile.TemporaryDirectory(prefix="cvx-probe-") as folder:
        block = _block(bundle, Path(folder))
        return {spec.name: _seconds(spec, block, options) for spec in able}


def _seconds(spec: EngineSpec, block: "Bundle", options: EngineOptions) -> float | None:
    import numpy as np

    from cvx_deploy.bundle.schema import numpy_dtype

    network = block.network(_TRANSFORMER)
    inputs = {given.name: np.full(given.resolve({}), 0.1).astype(numpy_dtype(given.dtype)) for given in network.inputs}
    times: list[float] = []
    try:
        with open_backend(spec.name, block, options) as backend, backend.load(_TRANSFORMER, {}) as session:
            while not _suffice(times[1:]):
                start = time.perf_counter()
                session.run(inputs)
                times.append(time.perf_counter() - start)
    except CvxError:
        return None
    return statistics.median(times[1:])


def _suffice(times: list[float]) -> bool:
    """Whether so many runs, each of so many seconds, tell how fast an engine is."""
    if times and times[-1] > _LONG:
        return True
    return len(times) >= _LEAST and (sum(times) > _SECONDS or len(times) >= _MOST)


def _block(bundle: "Bundle", folder: Path) -> "Bundle":
    """Return one block of a bundle's transformer, for a batch of one, as a bundle of its own in a folder."""
    from cvx_deploy.engines.weights import mapped_weights
    from cvx_deploy.graph.bounded import bounded_graph
    from cvx_deploy.graph.pieces import piece, standalone

    name, network = bundle.network_name(_TRANSFORMER), bundle.network(_TRANSFORMER)
    _, model = bounded_graph(bundle, _TRANSFORMER)
    cut_out = _between_attentions(standalone(model, {}, {"batch": 1}))
    content = mapped_weights(bundle, name, cut_out.graph, SilentProgress())
    alone = standalone(cut_out, content, {"batch": 1})
    (folder / "block.onnx").write_bytes(alone.SerializeToString())
    entry = replace(bundle.manifest.shapes[bundle.index], networks={_TRANSFORMER: name})
    networks = {name: piece(folder / "block.onnx", network)}
    return replace(bundle, path=folder, index=0, manifest=replace(bundle.manifest, networks=networks, shapes=(entry,)))


def _between_attentions(model: "onnx.ModelProto") -> "onnx.ModelProto":
    """Return a block: from after one attention to the next one; all of a network that has none."""
    from cvx_deploy.graph.pieces import cut

    attentions = [place for place, node in enumerate(model.graph.node) if node.op_type == "Attention"]
    for first, last in itertools.pairwise(attentions):
        found = cut(model, first + 1, last + 1)
        if found is not None:
            return found
    return model
