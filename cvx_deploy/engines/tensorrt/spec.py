"""What the two TensorRT libraries say of themselves."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from cvx_deploy.engines.spec import EngineOptions, EngineSpec, Needed, Probe
from cvx_deploy.engines.tensorrt import libraries
from cvx_deploy.engines.tensorrt.libraries import EngineKind
from cvx_deploy.errors import EngineError
from cvx_deploy.progress import Progress

if TYPE_CHECKING:
    from cvx_deploy.bundle.opened import Bundle
    from cvx_deploy.engines.tensorrt.backend import TensorRtBackend


@contextmanager
def _open(
    kind: EngineKind, bundle: "Bundle", options: EngineOptions, needed: Needed, progress: Progress
) -> "Iterator[TensorRtBackend]":
    from cvx_deploy.engines import cuda
    from cvx_deploy.engines.tensorrt import backend
    from cvx_deploy.engines.tensorrt.store import EngineStore

    with backend.TensorRtBackend(
        bundle,
        libraries.load_library(kind),
        cuda.CudaPython(),
        EngineStore(bundle),
        device=options.device,
        cuda_graphs=options.cuda_graphs,
        vram=options.vram,
        residency=options.residency,
        progress=progress,
    ) as opened:
        opened.require(needed)
        yield opened


def _version(kind: EngineKind) -> str:
    return libraries.load_library(kind).version


def _probe(kind: EngineKind) -> Probe:
    try:
        return Probe(True, _version(kind))
    except EngineError as error:
        return Probe(False, error.what, error.fix)


def _spec(kind: EngineKind) -> EngineSpec:
    return EngineSpec(
        name=kind,
        where="gpu",
        compiled=True,
        takes=frozenset({"device", "vram", "cuda_graphs"}),
        version=partial(_version, kind),
        probe=partial(_probe, kind),
        obstacle=lambda _: "",
        open=partial(_open, kind),
    )


FULL, RTX = _spec("tensorrt"), _spec("tensorrt-rtx")
