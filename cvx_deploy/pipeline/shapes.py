"""Which of a bundle's shapes a run is at, and the latents of that shape."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cvx_deploy.bundle.opened import Bundle
from cvx_deploy.errors import MediaError, ShapeError
from cvx_deploy.pipeline.npy import header_of
from cvx_deploy.reading import check_regular, reading
from cvx_deploy.shape import Shape


@dataclass(frozen=True)
class ShapeChoice:
    """The video size that is asked for; None where any will do."""

    frames: int | None = None
    height: int | None = None
    width: int | None = None

    def admits(self, shape: Shape) -> bool:
        """Whether a shape is what is asked for."""
        return shape == self.filled_up(shape)

    def filled_up(self, shape: Shape) -> Shape:
        """Return what is asked for, with the sizes of `shape` where any will do."""
        return Shape(
            shape.frames if self.frames is None else self.frames,
            shape.height if self.height is None else self.height,
            shape.width if self.width is None else self.width,
        )


def bundle_at(bundle: Bundle, wanted: ShapeChoice, from_latents: Path | None = None) -> Bundle:
    """Return the bundle seen at the first of its shapes that is `wanted`, or that the latents in a file fit.

    Raises:
        ShapeError: There is none, or the latents are of another size than `wanted`.
        MediaError: The file holds no latents.
    """
    held = None if from_latents is None else shape_of_latents(latents_header(from_latents), bundle)
    if held is None:
        return bundle.at(next(filter(wanted.admits, bundle.shapes), wanted.filled_up(bundle.shape)))
    if not wanted.admits(held):
        raise ShapeError(
            f"{from_latents} holds latents of {held}, not of {wanted.filled_up(held)}",
            fix="leave out --shape, --frames, --height and --width, or use other latents",
        )
    if held not in bundle.shapes:
        raise ShapeError(
            f"{from_latents} holds latents of {held}, and {bundle.path} makes {', '.join(map(str, bundle.shapes))}",
            fix=f"run: {bundle.export_command((*bundle.shapes, held))}",
        )
    return bundle.at(held)


def latents_header(path: Path) -> NDArray[Any]:
    """Map a ``.npy`` file, and raise MediaError when it is none."""
    fix = "use a file that --save-latents wrote"
    size = check_regular(path, MediaError, fix=fix)
    with reading(path, MediaError, fix=fix, says="holds no latents"), path.open("rb") as file:
        dtype, shape, start, order = header_of(file, size)
        return np.memmap(file, dtype, "r", start, shape, order)


def latent_shape(bundle: Bundle) -> tuple[int, int, int, int, int]:
    """Return the transformer's latents (B, F, C, H, W), padding frames included."""
    vae, shape = bundle.manifest.vae, bundle.shape
    frames = -(-shape.frames // vae.temporal) + padding(bundle)
    return 1, frames, vae.latent_channels, shape.height // vae.spatial, shape.width // vae.spatial


def padding(bundle: Bundle) -> int:
    """Return how many latent frames 1.5 adds in front, so that its temporal patches divide them."""
    frames = -(-bundle.shape.frames // bundle.manifest.vae.temporal)
    return -frames % (bundle.manifest.traits.patch_size_t or 1)


def shape_of_latents(latents: NDArray[Any], bundle: Bundle) -> Shape | None:
    """Return the video size that finished latents (videos, F, C, H, W) decode to, or None when they are no such."""
    vae = bundle.manifest.vae
    if latents.ndim != 5 or latents.shape[2] != vae.latent_channels or 0 in latents.shape:
        return None
    _, frames, _, height, width = latents.shape
    # An odd count of latent frames is one video frame and whole latent frames after it.
    return Shape(
        vae.temporal * (frames - 1) + 1 if frames % 2 else vae.temporal * frames,
        vae.spatial * height,
        vae.spatial * width,
    )
