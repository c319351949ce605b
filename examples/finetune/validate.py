"""Videos of a run that still trains, exported and made as those of a finished one are: through the engines."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cvx_deploy import Pipeline
from cvx_deploy.errors import CvxError, PromptError
from cvx_deploy.exporters.export import ExportRequest, bundle_from_checkpoint
from cvx_deploy.media.read import load_image
from cvx_deploy.pipeline.request import RunRequest
from cvx_deploy.shape import Shape


@dataclass(frozen=True)
class Validation:
    """What to look at on the way.

    Attributes:
        checkpoint: What is fine-tuned.
        every: Steps between looks.
        prompts: One video each.
        image: Their first frame, for image-to-video.
        shapes: The size they are made at; none for the model's own.
        steps: Denoising steps; None for the bundle's own.
        guidance_scale: Likewise.
    """

    checkpoint: Path
    every: int
    prompts: tuple[str, ...]
    image: Path | None = None
    shapes: tuple[Shape, ...] = ()
    steps: int | None = None
    guidance_scale: float | None = None

    def __post_init__(self) -> None:
        if not self.prompts:
            raise PromptError("there are no prompts to validate with", fix="name at least one with --prompt")
        if self.every < 1:
            raise CvxError(f"every {self.every} steps is never", fix="choose 1 or more")
        if self.image is not None:
            load_image(self.image, 16, 16)


def bundle_of(checkpoint: Path, trained: Path, method: str, output: Path, shapes: Sequence[Shape] = ()) -> None:
    """Export a checkpoint with what was trained: adapters merged in, or a transformer in place of its own."""
    request = ExportRequest(
        "fine-tuned",
        checkpoint,
        shapes=tuple(shapes),
        loras=((trained, 1.0),) if method == "lora" else (),
        transformer=trained if method == "full" else None,
    )
    bundle_from_checkpoint(request, output)


def validate(validation: Validation, trained: Path, method: str, output: Path) -> None:
    """Write a video a prompt and a contact sheet of all into `output`; the bundle beside serves every look."""
    place = output.parent / "bundle"
    output.mkdir(parents=True, exist_ok=True)
    bundle_of(validation.checkpoint, trained, method, place, validation.shapes)
    with Pipeline.from_bundle(place) as pipe:
        defaults = pipe.bundle.manifest.defaults
        request = RunRequest(
            validation.prompts,
            output / "video.mp4",
            image=validation.image,
            steps=validation.steps or defaults.steps,
            guidance_scale=defaults.guidance_scale if validation.guidance_scale is None else validation.guidance_scale,
            contact_sheet=output / "contact.png",
        )
        pipe.run(request)
