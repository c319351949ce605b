"""Parity in tests: `assert_parity`; `cvx_deploy.pytest_plugin` has it as a fixture."""

from pathlib import Path
from typing import TYPE_CHECKING

from cvx_deploy.bundle.opened import Bundle
from cvx_deploy.progress import Progress, SilentProgress

if TYPE_CHECKING:
    from cvx_deploy.engines.spec import EngineName
    from cvx_deploy.exporters.reference.checkpoint import Reference
    from cvx_deploy.measure.difference import Video
    from cvx_deploy.parity.check import CheckRequest
    from cvx_deploy.parity.ladder import Level, Parity
    from cvx_deploy.shape import Shape


def assert_parity(
    bundle: Path | str,
    checkpoint: Path | str | None = None,
    *,
    revision: str | None = None,
    offline: bool = False,
    level: "Level" = "video",
    engine: "EngineName | None" = None,
    steps: int = 4,
    output: Path | str | None = None,
) -> "Parity":
    """Fail unless a bundle agrees with its checkpoint in diffusers, at every shape and batch.

    Args:
        bundle: Its folder.
        checkpoint: A folder in diffusers layout, a Hugging Face id, or ``modelscope://`` and an id there; None for what
            the bundle was exported from.
        revision: A branch, tag or commit of a hub's repository.
        offline: Whether to use what has been fetched before, and no network.
        level: ``networks``; ``trajectory``, which adds the latents of every step; ``video``, which adds the pixels.
        engine: What the last rung runs on; it fails where that cannot run the bundle. None for ONNX Runtime, or
            OpenVINO for bf16; where no engine for a CPU runs it, that rung is skipped, and the result says so.
        steps: Denoising steps.
        output: Where to put the reports, if anywhere.

    Raises:
        AssertionError: Naming the first rung that fails, and the layers at which the networks part.
        CvxError: The bundle or the checkpoint cannot be read.
    """
    from cvx_deploy.exporters.reference.checkpoint import Reference
    from cvx_deploy.parity.check import CheckRequest

    reference = Reference(None if checkpoint is None else str(checkpoint), revision, offline)
    request, folder = CheckRequest(engine, level, steps=steps), None if output is None else Path(output)
    found = parity(Bundle.open(Path(bundle)), reference, request, SilentProgress(), folder)
    if found.error is not None:
        raise AssertionError(f"{found.error}\n{found}")
    return found


def parity(
    bundle: Bundle, reference: "Reference", request: "CheckRequest", progress: Progress, output: Path | None
) -> "Parity":
    """Check a bundle, and write the reports and one picture a shape to `output`."""
    from cvx_deploy.exporters.reference.checkpoint import reference_checkpoint, with_weights
    from cvx_deploy.parity.check import check
    from cvx_deploy.parity.forms import save_frames, write_report

    def show(shape: "Shape", eager: "Video", engine: "Video") -> None:
        if output is not None:
            output.mkdir(parents=True, exist_ok=True)
            name = "contact.png" if shape == first else f"contact_{shape}.png"
            factor = save_frames(output / name, eager, engine)
            progress.note(f"{output / name}: diffusers, the engine, and the difference, {factor:.0f} times")

    first = (request.shapes or bundle.shapes)[0]
    source = reference_checkpoint(bundle, reference, progress)
    found = check(with_weights(bundle, source.root), source, request, progress, show)
    if output is not None:
        write_report(found, output)
    return found
