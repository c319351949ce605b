"""What ONNX Runtime says of itself: on a CPU, and on a GPU with its CUDA provider."""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial
from typing import TYPE_CHECKING

from cvx_deploy.engines.spec import EngineOptions, EngineSpec, Needed, Probe
from cvx_deploy.errors import EngineError
from cvx_deploy.progress import Progress

if TYPE_CHECKING:
    from cvx_deploy.bundle.opened import Bundle
    from cvx_deploy.bundle.schema import Manifest
    from cvx_deploy.engines.onnxruntime.backend import OrtBackend


@contextmanager
def _open_on_cpu(
    bundle: "Bundle", options: EngineOptions, needed: Needed, progress: Progress
) -> "Iterator[OrtBackend]":
    from cvx_deploy.engines.onnxruntime.backend import OrtBackend

    with closing(OrtBackend(bundle, options.threads, progress, residency=options.residency)) as backend:
        yield backend


@contextmanager
def _open_on_gpu(
    bundle: "Bundle", options: EngineOptions, needed: Needed, progress: Progress
) -> "Iterator[OrtBackend]":
    from cvx_deploy.engines.cuda import CudaPython
    from cvx_deploy.engines.onnxruntime.backend import OrtBackend, check_cuda_package
    from cvx_deploy.engines.onnxruntime.convolution import check_convolution

    check_cuda_package()
    CudaPython().gpu(options.device)  # says of a driver or a device that is missing what ONNX Runtime does not
    with closing(OrtBackend(bundle, None, progress, options.device, residency=options.residency)) as backend:
        check_convolution(options.device)  # or a missing cuDNN would show after the prompt, or after all denoising
        yield backend


def _version() -> str:
    import onnxruntime

    return str(onnxruntime.__version__)


def _probe(device: int | None) -> Probe:
    """Tell what was seen to work: nothing is said to run before something ran."""
    from cvx_deploy.engines.onnxruntime.backend import check_device
    from cvx_deploy.engines.onnxruntime.convolution import check_convolution

    try:
        if device is not None:
            check_device(device)
        check_convolution(device)
    except EngineError as error:
        return Probe(False, error.what, error.fix)
    return Probe(True, "runs fp32 and fp16 bundles on the CPU" if device is None else "runs bundles on an NVIDIA GPU")


def _obstacle_on_cpu(manifest: "Manifest") -> str:
    if "bf16" in manifest.computes_in:
        return "ONNX Runtime has no bf16 on the CPU"
    return "no CPU multiplies in fp8" if "fp8" in manifest.multiplies_in else ""


CPU = EngineSpec(
    name="onnxruntime",
    where="cpu",
    compiled=False,
    takes=frozenset({"threads", "ram"}),
    version=_version,
    probe=partial(_probe, None),
    obstacle=_obstacle_on_cpu,
    open=_open_on_cpu,
)
CUDA = EngineSpec(
    name="onnxruntime-cuda",
    where="gpu",
    compiled=False,
    takes=frozenset({"device"}),
    version=_version,
    probe=partial(_probe, 0),
    obstacle=lambda _: "",
    open=_open_on_gpu,
)
