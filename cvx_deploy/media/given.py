"""Images and clips as Python code has them, to the pixels that files of them would give."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cvx_deploy.errors import MediaError
from cvx_deploy.media.read import load_image, load_video, pixels_of

Pixels = NDArray[np.float32]
ImageLike = Path | str | Image.Image | NDArray[Any]
"""A file; a PIL image; or an array (height, width, 3), uint8, or floats in [0, 1]."""
ClipLike = Path | str | Sequence[ImageLike] | NDArray[Any]
"""A file or a folder; a sequence of images; or an array (frames, height, width, 3)."""

_FIX = "give a file, a PIL image, or an array (height, width, 3) of uint8, or of floats in [0, 1]"


def image_pixels(image: ImageLike, height: int, width: int) -> Pixels:
    """Return an image's pixels, (1, 3, 1, H, W) in [-1, 1], as diffusers prepares a PIL image of it.

    Raises:
        MediaError: It is no image.
    """
    if isinstance(image, Path | str):
        return load_image(Path(image), height, width)
    return _frame(image, height, width)[None, :, None]


def clip_pixels(clip: ClipLike, frames: int, height: int, width: int) -> Pixels:
    """Return the pixels of a clip's first frames, (1, 3, F, H, W) in [-1, 1].

    Raises:
        MediaError: It has fewer frames, or is no clip.
    """
    if isinstance(clip, Path | str):
        return load_video(Path(clip), frames, height, width).pixels
    if len(clip) < frames:
        raise MediaError(f"the video has {len(clip)} frames, and {frames} are needed", fix="give a longer one")
    return np.stack([_frame(image, height, width) for image in clip[:frames]], axis=1)[None]


def _frame(image: ImageLike, height: int, width: int) -> Pixels:
    if isinstance(image, Path | str):
        return load_image(Path(image), height, width)[0, :, 0]
    if isinstance(image, Image.Image):
        return pixels_of(image.convert("RGB"), height, width)
    array = np.asarray(image)
    if array.ndim != 3 or array.shape[-1] != 3 or not array.size:
        raise MediaError(f"an image has the shape {array.shape}", fix=_FIX)
    if array.dtype == np.uint8:
        return pixels_of(Image.fromarray(np.ascontiguousarray(array)), height, width)
    if not np.issubdtype(array.dtype, np.floating) or not (array.min() >= 0 and array.max() <= 1):
        raise MediaError(f"an image of {array.dtype} has values that are not in [0, 1]", fix=_FIX)
    if array.shape[:2] != (height, width):
        raise MediaError(
            f"an image of floats has {array.shape[0]}x{array.shape[1]} pixels, not {height}x{width}",
            fix="resize it, or give a PIL image, which is resized as diffusers does it",
        )
    return 2.0 * array.astype(np.float32).transpose(2, 0, 1) - 1.0
