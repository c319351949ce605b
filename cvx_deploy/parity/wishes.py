"""What a check asks both diffusers and an engine to make: a video of each task that a bundle offers."""

from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from PIL import Image

from cvx_deploy.bundle.opened import Bundle
from cvx_deploy.shape import Shape

if TYPE_CHECKING:
    from cvx_deploy.exporters.reference.eager import EagerRequest

GUIDANCE = 6.0
_SEED_OF_IMAGE = 0


class Asked(Protocol):
    """What of a check's request is asked of every video."""

    @property
    def prompt(self) -> str:
        """Return the prompt."""

    @property
    def steps(self) -> int:
        """Return the denoising steps."""

    @property
    def seed(self) -> int:
        """Return the seed."""


def wish_of(bundle: Bundle, shape: Shape, asked: Asked, folder: Path) -> "EagerRequest":
    """Return what a bundle is made for: a video from the prompt, and from an image where it takes one."""
    from cvx_deploy.exporters.reference.eager import EagerRequest

    image = None
    if bundle.manifest.traits.task == "image-to-video":
        image = folder / "image.png"
        _picture(_SEED_OF_IMAGE, shape).save(image)
    return EagerRequest(asked.prompt, asked.steps, asked.seed, GUIDANCE, image)


def remake_of(shape: Shape, asked: Asked, folder: Path) -> "EagerRequest":
    """Return a video that is made in half the steps from a clip; every frame of that is another picture."""
    from cvx_deploy.exporters.reference.eager import EagerRequest, clip_names

    clip = folder / f"clip-{shape}"
    clip.mkdir()
    for seed, name in enumerate(clip_names(shape.frames)):
        _picture(seed, shape).save(clip / name)
    return EagerRequest(asked.prompt, max(asked.steps, 2), asked.seed, GUIDANCE, video=clip, strength=0.5)


def _picture(seed: int, shape: Shape) -> Image.Image:
    few = np.random.default_rng(seed).integers(0, 255, (4, 5, 3), np.uint8)
    return Image.fromarray(few).resize((shape.width, shape.height), Image.Resampling.BICUBIC)
