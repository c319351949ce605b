"""Colour and brightness of a clip, brought to those of the clip before it, and held at those of the first.

A model's first frame is not quite the image that it was given, and its brightness moves on within a clip. Each clip
starts where the last one ended, so that both add up. Three things are done. Channel by channel, a clip's mean and
contrast are matched to those of the shared frames, which show the same. What the first of them still differ by is taken
from the frames that follow, less and less. And the median of each frame is led to the median of the first clip, channel
by channel: a median hardly sees what moves in front of a background.
"""

import numpy as np
from numpy.typing import NDArray

Clip = NDArray[np.uint8]  # (n, H, W, 3)
Levels = NDArray[np.float32]  # (3,), in [0, 255]
_MOST_GAIN = 1.25  # of contrast, where what the frames show is not the same after all
_LEAST_DEVIATION = 0.5  # of 255: a plain picture has no contrast to match


def levels_of(clip: Clip) -> Levels:
    """Return the median of each channel over all frames."""
    return np.asarray(np.median(clip.reshape(-1, 3), axis=0), np.float32)


def matched(clip: Clip, shared: Clip, levels: Levels | None) -> Clip:
    """Return a clip in the colours of the one before it.

    Args:
        clip: As it was decoded; its first frames show what `shared` shows.
        shared: The last frames of the clip before.
        levels: Medians that are led to over the first half of the clip; None to leave it at the seam.

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
            pixels += way * (levels - np.median(pixels.reshape(-1, 3), axis=0))
        result[index] = pixels.round().clip(0, 255)
    return result
