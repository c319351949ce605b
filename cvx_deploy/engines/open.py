"""From the name of an engine to the backend that runs it, and what each engine lets a user choose."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Literal, TypeGuard, get_args

from cvx_deploy.engines.tensorrt.libraries import ENGINE_KINDS, EngineKind
from cvx_deploy.errors import EngineError
from cvx_deploy.install import pip_install
from cvx_deploy.progress import Progress

if TYPE_CHECKING:
    from cvx_deploy.bundle.opened import Bundle
    from cvx_deploy.engines.backend import Backend
    from cvx_deploy.engines.onnxruntime.backend import OrtBackend
    from cvx_deploy.engines.openvino.backend import OpenVinoBackend
    from cvx_deploy.engines.tensorrt.backend import TensorRtBackend

EngineName = Literal["onnxruntime", "openvino", "onnxruntime-cuda", "tensorrt", "tensorrt-rtx"]
ENGINES: tuple[EngineName, ...] = get_args(EngineName)
OPENVINO = pip_install("openvino")


def on_gpu(engine: EngineName) -> bool:
    """Whether an engine runs on a GPU, and so on one of several."""
    return engine not in ("onnxruntime", "openvino")


def compiled(engine: EngineName) -> TypeGuard[EngineKind]:
    """Whether an engine runs what `cvx-deploy build` has compiled."""
    return engine in ENGINE_KINDS


def engine_version(engine: EngineName) -> str:
    """Return the version of an engine's library.

    Raises:
        EngineError: It is not installed.
    """
    if compiled(engine):
        from cvx_deploy.engines.tensorrt.libraries import load_library

        return load_library(engine).version
    if engine == "openvino":
        try:
            return version("openvino")
        except PackageNotFoundError as error:
            raise EngineError("openvino is not installed here", fix=OPENVINO) from error
    import onnxruntime

    return str(onnxruntime.__version__)


@contextmanager
def open_backend(
    engine: EngineName,
    bundle: "Bundle",
    *,
    needed: Sequence[tuple[str, Mapping[str, int]]] = (),
    device: int = 0,
    threads: int | None = None,
    vram: int | None = None,
    cuda_graphs: bool = True,
    check_finite: bool = False,
    progress: Progress | None = None,
) -> "Iterator[Backend]":
    """Open a bundle on an engine for as long as the block lasts; no weights are loaded yet.

    Args:
        engine: What runs it.
        bundle: What to run.
        needed: Role and sizes of every network that will be loaded; one without an engine is said at once.
        device: Which GPU, for the engines that run on one.
        threads: CPU threads of ONNX Runtime or OpenVINO; None for one a core.
        vram: Bytes of device memory that compiled engines may use; None for all there are.
        cuda_graphs: Whether compiled engines are launched as CUDA graphs.
        check_finite: Whether every output is searched for NaN and infinity, which is slow.
        progress: Told what is worth knowing.

    Raises:
        EngineError: The engine is not installed, or this machine cannot run it.
    """
    with ExitStack() as stack:
        backend: Backend
        if compiled(engine):
            native = stack.enter_context(_tensorrt(engine, bundle, device, vram, cuda_graphs, progress))
            native.require(needed)
            backend = native
        elif engine == "openvino":
            backend = _openvino(bundle, threads, progress)
        else:
            backend = _onnxruntime(bundle, device if on_gpu(engine) else None, threads, progress)
        if check_finite:
            from cvx_deploy.engines.finite import FiniteBackend

            backend = FiniteBackend(backend)
        yield backend


def _onnxruntime(bundle: "Bundle", device: int | None, threads: int | None, progress: Progress | None) -> "OrtBackend":
    from cvx_deploy.engines.onnxruntime.backend import OrtBackend, check_cuda_package

    if device is not None:
        from cvx_deploy.engines.cuda import CudaPython

        check_cuda_package()
        CudaPython().gpu(device)  # says of a driver or a device that is missing what ONNX Runtime does not
    return OrtBackend(bundle, threads, progress, device)


def _openvino(bundle: "Bundle", threads: int | None, progress: Progress | None) -> "OpenVinoBackend":
    try:
        from cvx_deploy.engines.openvino.backend import OpenVinoBackend
    except ImportError as error:
        raise EngineError(f"openvino is not installed here ({error})", fix=OPENVINO) from error
    return OpenVinoBackend(bundle, threads, progress)


def _tensorrt(
    kind: EngineKind, bundle: "Bundle", device: int, vram: int | None, cuda_graphs: bool, progress: Progress | None
) -> "TensorRtBackend":
    from cvx_deploy.engines.cuda import CudaPython
    from cvx_deploy.engines.tensorrt.backend import TensorRtBackend
    from cvx_deploy.engines.tensorrt.libraries import load_library
    from cvx_deploy.engines.tensorrt.store import EngineStore

    library, cuda, store = load_library(kind), CudaPython(), EngineStore(bundle)
    return TensorRtBackend(
        bundle, library, cuda, store, device=device, cuda_graphs=cuda_graphs, vram=vram, progress=progress
    )
