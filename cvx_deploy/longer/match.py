"""Colour and brightness of a clip, brought to those of the clip before it, and held at those of the first.

A model's first frame is not quite the image that it was given, and its brightness moves on within a clip. Each clip
starts where the last one ended, so that both add up. Three things are done:

1. Channel by channel, mean and contrast are matched to those of the shared frames, which show the same.
2. What the first of the shared frames still differs by is taken from the frames that follow, less and less.
3. Dark, middle and bright levels of each frame are led to those of the first clip, channel by channel. The middle
   one, a median, hardly sees what moves in front of a background. The others do, and are left alone where they are far
   off: something has come or gone then.
"""

import numpy as np
from numpy.typing import NDArray

Clip = NDArray[np.uint8]  # (n, H, W, 3)
Levels = NDArray[np.float32]  # (3, 3): dark, middle and bright of each channel, in [0, 255]
_QUANTILES = (0.02, 0.5, 0.98)
_MOST_GAIN = 1.25  # of contrast, where what the frames show is not the same after all
_LEAST_DEVIATION = 0.5  # of 255: a plain picture has no contrast to match
_NEAR = 8.0  # of 255: levels so near to the median are led where it is led
_FAR = 64.0  # of 255: dark and bright levels that far off are of something else


def levels_of(pixels: NDArray[np.uint8] | NDArray[np.float32]) -> Levels:
    """Return the levels of each channel over all pixels, (..., 3)."""
    return np.asarray(np.quantile(pixels.reshape(-1, 3), _QUANTILES, axis=0), np.float32)


def matched(clip: Clip, shared: Clip, levels: Levels | None) -> Clip:
    """Return a clip in the colours of the one before it.

    Args:
        clip: As it was decoded; its first frames show what `shared` shows.
        shared: The last frames of the clip before.
        levels: What levels are led to over the first half of the clip; None to leave it at the seam.

    Returns:
        It; its first frame is the first of `shared`.
    """
    own = clip[: len(shared)].reshape(-1, 3).astype(np.float32)
    given = shared.reshape(-1, 3).astype(np.float32)
    gain = (given.std(axis=0) + _LEAST_DEVIATION) / (own.std(axis=0) + _LEAST_DEVIATION)
    gain = gain.clip(1 / _MOST_GAIN, _MOST_GAIN)
    amiss: NDArray[np.float32] | None = None
    result = np.empty_like(clip)
    for index, frame in enumerate(clip):  # one at a time, so that a clip of floats is never held
        pixels = (frame - own.mean(axis=0)) * gain + given.mean(axis=0)
        way = np.float32(min(1.0, 2 * index / max(len(clip) - 1, 1)))
        if amiss is None:
            amiss = shared[0] - pixels
        pixels += (1 - way) * amiss
        if levels is not None:
            pixels += way * _amiss(pixels, levels)
        result[index] = pixels.round().clip(0, 255)
    return result


def _amiss(pixels: NDArray[np.float32], levels: Levels) -> NDArray[np.float32]:
    """Return what brings each pixel of a frame to the levels, (H, W, 3): that of its own level, between those known."""
    own = levels_of(pixels)
    shift = levels - own
    for end in (0, 2):
        shift[end] *= np.maximum(1 - np.abs(shift[end]) / _FAR, 0)
        shift[end] = np.where(np.abs(own[end] - own[1]) < _NEAR, shift[1], shift[end])
    planes = [np.interp(pixels[..., channel], own[:, channel], shift[:, channel]) for channel in range(3)]
    return np.stack(planes, axis=-1).astype(np.float32)
