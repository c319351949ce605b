"""Whatever was decoded, as upright 8-bit RGB: the one place that knows depth, display matrix, range and alpha.

As in diffusers, alpha is dropped, not blended. Unlike there, grey of 16 bits is scaled to 8: Pillow's own conversion
clips it, and nearly every such picture comes out white.
"""

import numpy as np
from av.sidedata.sidedata import Type
from av.video.frame import VideoFrame
from numpy.typing import NDArray
from PIL import Image, ImageOps

_OF_16_BITS = 257  # 0xffff over 0xff
_MATRIX = 9  # numbers of a display matrix, 32 bits each


def rgb_of_image(image: Image.Image) -> Image.Image:
    """Return a picture that Pillow has opened, turned as its EXIF orientation says."""
    upright = ImageOps.exif_transpose(image)
    if upright.mode == "I" or upright.mode.startswith("I;16"):
        deep = np.clip(np.asarray(upright).astype(np.float64), 0, 0xFFFF)
        upright = Image.fromarray((deep / _OF_16_BITS).round().astype(np.uint8))
    return upright.convert("RGB")


def rgb_of_frame(frame: VideoFrame) -> Image.Image:
    """Return a frame that FFmpeg has decoded, turned and mirrored as its display matrix says.

    FFmpeg converts by the frame's own depth, range (limited or full) and matrix (BT.601, BT.709, ...).
    """
    pixels: NDArray[np.uint8] = np.asarray(frame.to_ndarray(format="rgb24"), np.uint8)
    side = frame.side_data.get(Type.DISPLAYMATRIX)  # type: ignore[call-overload]
    return Image.fromarray(pixels if side is None else displayed(pixels, bytes(side)))


def displayed(pixels: NDArray[np.uint8], matrix: bytes) -> NDArray[np.uint8]:
    """Return pixels, (height, width, 3), as a player shows them.

    A display matrix (ISO/IEC 14496-12, 6.2.2) maps a pixel (x, y) to (a x + c y, b x + d y). Quarter turns and
    mirrors, and all that they make together, are done; an angle between is taken for the nearest of them.

    Args:
        pixels: As they are decoded.
        matrix: Nine 32-bit integers: a, b, u, c, d, v, x, y, w.
    """
    numbers = np.frombuffer(matrix[: len(matrix) // 4 * 4], np.int32)
    if numbers.size != _MATRIX:
        return pixels
    a, b, _, c, d, *_ = numbers.astype(np.int64)
    if abs(a) + abs(d) < abs(b) + abs(c):  # the axes change places
        pixels, across, down = pixels.transpose(1, 0, 2), c, b
    else:
        across, down = a, d
    pixels = pixels[:, ::-1] if across < 0 else pixels
    return np.ascontiguousarray(pixels[::-1] if down < 0 else pixels)
