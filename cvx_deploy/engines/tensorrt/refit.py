"""Other weights in the engine that is there: a bundle beside another, or in its place, without a build.

The transformer's engine is loaded on the GPU, every weight that the new bundle's graph points elsewhere is exchanged,
and the engine is written again, for the key that the new bundle asks for. Engines of networks whose graph and weights
are the same are placed beside it as they are.
"""

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from cvx_deploy.bundle.command import build_command
from cvx_deploy.bundle.opened import MANIFEST, Bundle, may_replace
from cvx_deploy.bundle.schema import Manifest
from cvx_deploy.engines.tensorrt.compiled_plan import CompiledPlan
from cvx_deploy.engines.tensorrt.engine import EngineLoader
from cvx_deploy.engines.tensorrt.libraries import EngineKind, Library
from cvx_deploy.engines.tensorrt.network import onnx_model
from cvx_deploy.engines.tensorrt.store import EngineKey, EngineRecord, EngineStore, Platform, WrittenEngine
from cvx_deploy.engines.weights import mapped_weights
from cvx_deploy.errors import EngineError, OutputError
from cvx_deploy.files import place_file, require_space, staged_directory, staged_file
from cvx_deploy.measure.memory import MemoryWatch
from cvx_deploy.progress import Progress

_DENOISER = "transformer"
WEIGHT_TYPES = {
    onnx.TensorProto.FLOAT: ("FLOAT", 4),
    onnx.TensorProto.FLOAT16: ("HALF", 2),
    onnx.TensorProto.BFLOAT16: ("BF16", 2),
    onnx.TensorProto.INT64: ("INT64", 8),
}
"""ONNX's types of weights, to the library's name of each and the bytes of an element."""

Rewrite = Callable[[Path], Manifest]
"""Writes graphs and weights of the new bundle into an empty folder, and returns its manifest."""


@dataclass(frozen=True)
class Refitted:
    """An engine that has other weights now.

    Attributes:
        changed: How many weights are others.
    """

    record: EngineRecord
    changed: int


def engine_kind(bundle: Bundle) -> EngineKind:
    """Return the kind of the transformer's newest engine, of the refittable ones where there are any.

    Raises:
        EngineError: It has no engine.
    """
    records = _engines(bundle)
    if not records:
        raise EngineError(f"{bundle.path} has no engine for {_DENOISER}", fix=build_command(bundle.path, "--refit"))
    return max(records, key=lambda record: (_is_refittable(record), record.built)).key.kind


def refit(
    library: Library, base: Bundle, rewrite: Rewrite, output: Path, platform: Platform | None, progress: Progress
) -> list[Refitted]:
    """Write a bundle at `output` with another transformer, whose engines are the base's with their weights exchanged.

    Args:
        library: Of the kind and version that built the engines.
        base: Where the engines are. It is not changed, unless `output` is its own place.
        rewrite: Makes all of the new bundle but its manifest and engines.
        output: Where it goes; an earlier bundle there is replaced when the new one is whole.
        platform: The GPU that is here, if one is.
        progress: Shows each step.

    Returns:
        The refitted engines.

    Raises:
        EngineError: There is no GPU or no engine that can be refitted here, before anything is written; or the engine
            refuses a weight.
        BundleError: A file of the bundle is missing or altered.
        OutputError: The place cannot be written.
    """
    here, records = _refittable(library, base, platform)
    loader = EngineLoader(library, here.capability, progress.note)
    try:
        with staged_directory(output, replace=may_replace(output)) as folder:
            bundle = Bundle(folder, rewrite(folder))
            (folder / MANIFEST).write_bytes(bundle.manifest.to_json())
            _place_engines(base, bundle, progress)
            for name in sorted(_networks(bundle) - {record.network for record in records}):
                progress.note(f"{name} has no engine that can be refitted: build {output} for it")
            # Engines for several GPUs each may become one and the same for the GPU that is here.
            todo = {(record.network, _key(library, bundle, record, here).digest): record for record in records}
            return [_refitted(library, loader, base, bundle, record, here, progress) for record in todo.values()]
    finally:
        loader.close()


def check_output(base: Bundle, output: Path) -> None:
    """Raise OutputError when a new bundle would take the place of the one it is made from."""
    if output.exists() and output.samefile(base.path):
        raise OutputError(f"{output} is the bundle itself, which is kept as it is", fix="choose another --output")


def _engines(bundle: Bundle) -> list[EngineRecord]:
    """Return the records of the transformer's engines, at every shape."""
    names = _networks(bundle)
    return [record for record in EngineStore(bundle).records() if record.network in names]


def _networks(bundle: Bundle) -> set[str]:
    """Return the names of the networks with the transformer's weights: its own, one a shape, and its modulation's."""
    return {entry.networks[role] for entry in bundle.manifest.shapes for role in (_DENOISER, "modulation")}


def _is_refittable(record: EngineRecord) -> bool:
    """Whether it was built for other weights: one that is only stripped takes back its own and no others."""
    return bool(record.key.settings.get("refit"))


def _refittable(library: Library, bundle: Bundle, platform: Platform | None) -> tuple[Platform, list[EngineRecord]]:
    """Return the GPU, and the engines of the transformer that can be refitted on it."""
    store = EngineStore(bundle)
    fix = f"{store.remedy(library.kind, [platform] if platform else [])} --refit"
    records = [record for record in _engines(bundle) if record.key.kind == library.kind]
    if not records:
        raise EngineError(f"{bundle.path} has no {library.kind} engine for {_DENOISER}", fix=fix)
    misfits = [record.key.misfits(store.wanted(record.network, library.version, platform)) for record in records]
    fitting = [record for record, differs in zip(records, misfits, strict=True) if not differs]
    if not fitting:
        nearest = min(misfits, key=len)
        raise EngineError(
            f"no {library.kind} engine of {bundle.path} for {_DENOISER} fits: {'; '.join(nearest)}", fix=fix
        )
    able = [record for record in fitting if _is_refittable(record)]
    if not able:
        raise EngineError(
            f"the engine {bundle.path / fitting[0].file.path} was built without --refit: its weights stay", fix=fix
        )
    if platform is None:
        raise EngineError(
            "there is no GPU here, and weights are exchanged on the one that the engine runs on",
            fix="run the command there, or merge the weights with cvx-deploy export --lora and build the bundle",
        )
    return platform, able


def _place_engines(base: Bundle, bundle: Bundle, progress: Progress) -> None:
    """Put every engine into the new bundle that fits its graphs and weights as it is."""
    old, new = EngineStore(base), EngineStore(bundle)
    new.folder.mkdir()
    for record in old.records():
        if record.network not in bundle.manifest.networks:
            continue
        if record.key.misfits(new.wanted(record.network, record.key.library, None)):
            continue
        base.check_file(record.plan)
        place_file(base.inside(record.plan.path), bundle.inside(record.plan.path))
        target = bundle.inside(record.file.path)
        with progress.task(f"place {record.network}", record.file.size) as advance:
            place_file(old.path(record), target, advance)
        new.keep(replace(record, mtime_ns=target.stat().st_mtime_ns))


def _key(library: Library, bundle: Bundle, record: EngineRecord, here: Platform) -> EngineKey:
    """Return the key that the new bundle asks for, of an engine as it is once it was refitted here."""
    network = bundle.manifest.networks[record.network]
    return replace(
        record.key,
        graph=network.file.sha256,
        weights={name: bundle.manifest.weights[name].sha256 for name in network.weights},
        # It is written with all of its weights, and what it held for other GPUs is not in what was loaded on this one.
        settings=record.key.settings | {"strip_weights": False},
        targets=(here.capability,) if library.ahead_of_time else record.key.targets,
    )


def _refitted(
    library: Library,
    loader: EngineLoader,
    base: Bundle,
    bundle: Bundle,
    record: EngineRecord,
    here: Platform,
    progress: Progress,
) -> Refitted:
    """Load one of the base's engines, exchange its weights, and write it, its plan and its record."""
    start = time.perf_counter()
    name, key, store = record.network, _key(library, bundle, record, here), EngineStore(bundle)
    graph = onnx_model(bundle, name).graph
    changed = _changed(onnx_model(base, name).graph, graph)
    require_space(bundle.path, record.file.size)
    path = store.place(key, name)
    with progress.task(f"refit {name}"), MemoryWatch() as memory:
        native = loader.deserialize(EngineStore(base).path(record), name)
        _exchange(library, loader, native, name, _Weights(bundle, name, graph, progress), changed)
        content = memoryview(_serialized(library, loader, native, name))
        with staged_file(path) as staging:
            staging.write_bytes(content)
    size, digest = content.nbytes, hashlib.sha256(content).hexdigest()
    engine = WrittenEngine(size, digest, record.attention, time.perf_counter() - start, memory)
    refitted = store.enter(key, name, engine, _plans(library, base, record, here))
    return Refitted(refitted, len(changed))


def _changed(before: onnx.GraphProto, after: onnx.GraphProto) -> set[str]:
    """Return the weights that the second graph has in another place."""
    places = {tensor.name: tensor.external_data for tensor in before.initializer}
    return {tensor.name for tensor in after.initializer if tensor.external_data != places[tensor.name]}


class _Weights:
    """A network's weights as the library takes them; the bytes stay where they are mapped while this lives."""

    def __init__(self, bundle: Bundle, name: str, graph: onnx.GraphProto, progress: Progress) -> None:
        self._types = {tensor.name: tensor.data_type for tensor in graph.initializer}
        self._content: dict[str, NDArray[np.uint8]] = {
            tensor.name: np.frombuffer(tensor.raw_data, np.uint8) for tensor in graph.initializer if tensor.raw_data
        }
        self._content.update(mapped_weights(bundle, name, graph, progress))

    def of(self, api: Any, weight: str) -> Any:
        """Return a weight as the library's ``Weights``; None where the graph has none of this name and a known type."""
        if weight not in self._content or self._types[weight] not in WEIGHT_TYPES:
            return None
        dtype, itemsize = WEIGHT_TYPES[self._types[weight]]
        content = self._content[weight]
        return api.Weights(getattr(api.DataType, dtype), content.ctypes.data, content.nbytes // itemsize)


def _exchange(
    library: Library, loader: EngineLoader, native: Any, name: str, weights: _Weights, changed: set[str]
) -> None:
    """Give an engine its new weights.

    Where the library made one weight of several (the three projections of an attention), it asks for the others too.
    """
    if not native.refittable:
        raise loader.failure(f"says that the engine of {name} cannot be refitted")
    refitter = loader.refitter(native)
    _check_known(name, changed, set(refitter.get_all_weights()))
    given: set[str] = set()
    asked = changed
    while asked:
        for weight in sorted(asked):
            value = weights.of(library.module, weight)
            if value is None or weight in given:
                raise _unknown(
                    f"the engine of {name} asks for a weight {weight or 'without a name'}, which cannot be given"
                )
            if not refitter.set_named_weights(weight, value):
                raise loader.failure(f"refuses the weight {weight} of {name}")
        given |= asked
        asked = set(refitter.get_missing_weights())
    if not refitter.refit_cuda_engine():
        raise loader.failure(f"cannot refit {name}")


def _check_known(name: str, changed: set[str], known: set[str]) -> None:
    unknown = changed - known
    if unknown:
        raise _unknown(f"the engine of {name} knows no weight {min(unknown)} that could be exchanged")


def _unknown(what: str) -> EngineError:
    return EngineError(what, fix="merge the weights with cvx-deploy export --lora, and build that bundle")


def _serialized(library: Library, loader: EngineLoader, native: Any, name: str) -> Any:
    """Return the bytes of an engine with all of its weights, refittable as before."""
    flag = library.module.SerializationFlag
    config = native.create_serialization_config()
    config.clear_flag(flag.EXCLUDE_WEIGHTS)
    config.set_flag(flag.INCLUDE_REFIT)
    content = native.serialize_with_config(config)
    if content is None:
        raise loader.failure(f"cannot write {name} again")
    return content


def _plans(library: Library, base: Bundle, record: EngineRecord, here: Platform) -> tuple[CompiledPlan, ...]:
    """Return the plans of an engine that was refitted here: the kernels are those of the engine before."""
    plans = EngineStore(base).plans(record)
    if library.ahead_of_time:
        of_here = (plan for plan in plans if here.capability in plan.targets)
        plans = tuple(replace(plan, targets=(here.capability,)) for plan in of_here)
    return plans
