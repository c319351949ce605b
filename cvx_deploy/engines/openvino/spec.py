"""What OpenVINO says of itself."""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from cvx_deploy.engines.spec import EngineOptions, EngineSpec, Needed, Probe
from cvx_deploy.errors import EngineError
from cvx_deploy.graph.streamed import LARGE_NETWORK
from cvx_deploy.install import pip_install
from cvx_deploy.measure.cpu import overflows_in_int8
from cvx_deploy.progress import Progress

if TYPE_CHECKING:
    from cvx_deploy.bundle.opened import Bundle
    from cvx_deploy.bundle.schema import Manifest
    from cvx_deploy.engines.openvino.backend import OpenVinoBackend

_INSTALL = pip_install("openvino")


def streams(role: str, weight_bytes: int) -> bool:
    """Whether a network's weights stay in their file and are converted in each run; see `cvx_deploy.graph.streamed`.

    A run of one token reads each weight once, while to arrange them all takes OpenVINO many times as long: a 5b's 84
    products are loaded in 8 s and 6.5 GB otherwise, instead of 1.3 s and 1.7 GB, and a step's then take 0.2 s, not 0.5.
    """
    return role == "modulation" and weight_bytes >= LARGE_NETWORK


@contextmanager
def _open(bundle: "Bundle", options: EngineOptions, needed: Needed, progress: Progress) -> "Iterator[OpenVinoBackend]":
    try:
        from cvx_deploy.engines.openvino.backend import OpenVinoBackend
    except ImportError as error:
        raise EngineError(f"openvino is not installed here ({error})", fix=_INSTALL) from error
    with closing(OpenVinoBackend(bundle, options.threads, progress, residency=options.residency)) as backend:
        yield backend


def _version() -> str:
    try:
        return version("openvino")
    except PackageNotFoundError as error:
        raise EngineError("openvino is not installed here", fix=_INSTALL) from error


def _probe() -> Probe:
    try:
        from cvx_deploy.engines.openvino.backend import precisions
    except ImportError as error:
        return Probe(False, f"is not installed here ({error})", _INSTALL)
    try:  # its plugin for CPUs is loaded to be asked
        return Probe(True, f"runs {', '.join(precisions())} bundles on this CPU")
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        return Probe(False, f"cannot use this CPU: {reason}", f"{_INSTALL} --force-reinstall")


def _obstacle(manifest: "Manifest") -> str:
    try:
        from cvx_deploy.engines.openvino.backend import precisions
    except ImportError as error:
        return f"openvino is not installed here ({error})"
    missing = sorted(manifest.computes_in.difference(precisions()))
    if missing:
        return f"this CPU has no instructions for {', '.join(missing)}"
    if "fp8" in manifest.multiplies_in:
        return "no CPU multiplies in fp8"
    overflows = "int8" in manifest.multiplies_in and overflows_in_int8()
    return "this CPU has no VNNI: in OpenVINO int8 would overflow" if overflows else ""


CPU = EngineSpec(
    name="openvino",
    where="cpu",
    compiled=False,
    takes=frozenset({"threads", "ram"}),
    version=_version,
    probe=_probe,
    obstacle=_obstacle,
    open=_open,
)
