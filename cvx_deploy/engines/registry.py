"""Every kind of engine, in the order in which they are listed; a new one is a folder here and a row in `SPECS`."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from cvx_deploy.engines.onnxruntime import spec as onnxruntime
from cvx_deploy.engines.openvino import spec as openvino
from cvx_deploy.engines.spec import DEFAULT_OPTIONS, EngineName, EngineOptions, EngineSpec, Needed
from cvx_deploy.engines.tensorrt import spec as tensorrt
from cvx_deploy.errors import EngineError
from cvx_deploy.progress import Progress, SilentProgress

if TYPE_CHECKING:
    from cvx_deploy.bundle.opened import Bundle
    from cvx_deploy.engines.backend import Backend

SPECS: Final[Mapping[EngineName, EngineSpec]] = {
    spec.name: spec for spec in (onnxruntime.CPU, openvino.CPU, onnxruntime.CUDA, tensorrt.FULL, tensorrt.RTX)
}
ENGINES: Final = tuple(SPECS)


def engine_spec(name: EngineName) -> EngineSpec:
    """Return what an engine says of itself.

    Raises:
        EngineError: There is none of that name.
    """
    if name not in SPECS:
        raise EngineError(f"there is no engine {name!r}", fix=f"use one of {', '.join(ENGINES)}")
    return SPECS[name]


@contextmanager
def open_backend(
    engine: EngineName,
    bundle: "Bundle",
    options: EngineOptions = DEFAULT_OPTIONS,
    *,
    needed: Needed = (),
    check_finite: bool = False,
    progress: Progress | None = None,
) -> "Iterator[Backend]":
    """Open a bundle on an engine for as long as the block lasts; no weights are loaded yet.

    Args:
        engine: What runs it.
        bundle: What to run.
        options: How.
        needed: Role and sizes of every network that will be loaded; one without an engine is said at once.
        check_finite: Whether every output is searched for NaN and infinity, which is slow.
        progress: Told what is worth knowing.

    Raises:
        EngineError: The engine is not installed, or this machine cannot run it, or an option means nothing to it.
    """
    spec = engine_spec(engine)
    spec.check(options)
    with spec.open(bundle, options, needed, progress or SilentProgress()) as backend:
        if check_finite:
            from cvx_deploy.engines.finite import FiniteCheck
            from cvx_deploy.engines.observe import ObservedBackend

            backend = ObservedBackend(backend, FiniteCheck(backend))
        yield backend
