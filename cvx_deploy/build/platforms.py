"""The GPU of this machine, as engines know it."""

from cvx_deploy.build.store import Platform
from cvx_deploy.errors import EngineError
from cvx_deploy.runtime.cuda import CudaPython


def platform_here(device: int = 0) -> Platform | None:
    """Describe a GPU of this machine; None where none can be used."""
    try:
        return Platform.of(CudaPython().gpu(device))
    except EngineError:
        return None
