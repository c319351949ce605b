"""The GPU of this machine, as engines know it."""

from cvx_deploy.engines.cuda import CudaPython, NoGpuError
from cvx_deploy.engines.tensorrt.store import Platform


def platform_here(device: int = 0) -> Platform | None:
    """Describe a GPU of this machine; None where there is none.

    Raises:
        EngineError: There may be one, and it cannot be used: cuda-python is missing, or the driver is too old.
    """
    try:
        return Platform.of(CudaPython().gpu(device))
    except NoGpuError:
        return None
