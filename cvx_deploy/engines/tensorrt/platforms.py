"""The GPU of this machine, as engines know it."""

from cvx_deploy.engines.cuda import CudaPython
from cvx_deploy.engines.tensorrt.store import Platform
from cvx_deploy.errors import EngineError


def platform_here(device: int = 0) -> Platform | None:
    """Describe a GPU of this machine; None where none can be used."""
    try:
        return Platform.of(CudaPython().gpu(device))
    except EngineError:
        return None
