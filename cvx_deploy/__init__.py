"""cvx-deploy: a compiler that takes CogVideoX from a checkpoint to engines, and runs them without PyTorch."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cvx_deploy.pipeline.pipeline import Pipeline as Pipeline
    from cvx_deploy.pipeline.video import Video as Video

__version__ = "0.1.0"
__all__ = ("Pipeline", "Video", "__version__")

_PLACES = {"Pipeline": "cvx_deploy.pipeline.pipeline", "Video": "cvx_deploy.pipeline.video"}


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is asked for, so that the command line starts at once."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_PLACES[name]), name)
