"""Engines in a diffusers pipeline: schedulers, callbacks and scripts around it go on unchanged.

::

    from cvx_deploy.diffusers import use_engines

    with use_engines(pipe, "engines/5b", engine="onnxruntime"):
        video = pipe("a red circle moves to the right").frames[0]
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from cvx_deploy.engines.residency import Policy
from cvx_deploy.engines.spec import EngineName, EngineOptions
from cvx_deploy.errors import EngineError
from cvx_deploy.install import pip_install
from cvx_deploy.progress import Progress

if TYPE_CHECKING:
    from cvx_deploy.exporters.dropin.use import Engines


def use_engines(
    pipe: Any,
    bundle: Path | str,
    *,
    engine: EngineName = "onnxruntime",
    threads: int | None = None,
    device: int = 0,
    vram: int | None = None,
    cuda_graphs: bool = True,
    residency: Policy = "resident",
    progress: Progress | None = None,
) -> "Engines":
    """Put a bundle's engines in the place of a pipeline's transformer, text encoder and VAE.

    Args:
        pipe: A CogVideoX pipeline of diffusers, or one of your own with networks of those names.
        bundle: The folder of a bundle that was exported from the same checkpoint.
        engine: What runs it.
        threads: CPU threads; None for one per core.
        device: Which GPU.
        vram: Bytes of device memory that compiled engines may use.
        cuda_graphs: Whether compiled engines are launched as CUDA graphs.
        residency: ``resident`` keeps all networks loaded, ``phase`` those of one phase of a call.
        progress: Told what goes on.

    Returns:
        A handle: its `close`, or the end of its ``with`` block, puts the pipeline's own networks back.

    Raises:
        CvxError: The pipeline is another model's, or has a LoRA, or the engine cannot run the bundle here; before
            anything is changed.
    """
    try:
        from cvx_deploy.exporters.dropin.use import engines_in
    except ModuleNotFoundError as error:
        raise EngineError(f"{error.name} is not installed", fix=pip_install("export")) from error
    options = EngineOptions(threads, device, vram, cuda_graphs, residency)
    return engines_in(pipe, Path(bundle), engine, options, progress)
