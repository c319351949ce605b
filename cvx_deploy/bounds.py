"""The largest numbers that make sense, a good way above those of any CogVideoX model.

Whatever comes from a file or from a user is held against these before anything is computed or allocated from it: a
manifest of a few bytes must not ask for terabytes.
"""

import json
import math
from typing import Annotated, Any

import msgspec

MOST_FRAMES = 1 << 12
LONGEST_SIDE = 1 << 14
"""Pixels of a video's height or width."""
MOST_PIXELS = 1 << 30
"""Pixels of all frames of a video: twelve times those of the largest published model."""
MOST_LATENTS = 1 << 28
"""Values of the latents of a video: 1 GiB."""
MOST_VALUES = 1 << 33
"""Values of a tensor whose sizes a manifest fixes."""
MOST_VIDEOS = 10_000
"""Videos of a run."""
MOST_STEPS = 100_000
"""Timesteps a model was trained with, or steps of a sampler."""
MOST_THREADS = 1024
MOST_SPEEDUP = 10.0
"""Of how many times less often the transformer is run."""
MOST_TOLERANCE = 1.0
"""Of how far forecasts may stray: all of an output."""
LARGEST_FACTOR = 1e6
"""Of a guidance scale, an adapter's scale, a VAE's scaling factor."""
LARGEST_FILE = 1 << 50
LOWEST_SEED, HIGHEST_SEED = -(2**63), 2**64 - 1

Positive = Annotated[int, msgspec.Meta(gt=0, le=1 << 24)]
"""A count, a width, a length: of layers, channels, tokens, pixels."""
Size = Annotated[int, msgspec.Meta(ge=0, le=LARGEST_FILE)]
"""Bytes of a file."""
Factor = Annotated[float, msgspec.Meta(ge=-LARGEST_FACTOR, le=LARGEST_FACTOR)]
PositiveFactor = Annotated[float, msgspec.Meta(gt=0, le=LARGEST_FACTOR)]


def finite_json(content: bytes | str) -> Any:
    """Return what JSON says, and raise ValueError for a number in it that is not finite or has more than 64 bits."""
    found = json.loads(content)
    _check_numbers(found)
    return found


def _check_numbers(value: Any) -> None:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for one in value:
            _check_numbers(one)
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{value} is no finite number")
    elif isinstance(value, int) and not -(2**63) <= value < 2**64:
        raise ValueError("it has a number of more than 64 bits")


def check_video(frames: int, height: int, width: int) -> None:
    """Raise ValueError for a video of more frames or pixels than make sense."""
    if frames > MOST_FRAMES or max(height, width) > LONGEST_SIDE or frames * height * width > MOST_PIXELS:
        raise ValueError(
            f"{frames}x{height}x{width} is beyond {MOST_FRAMES} frames, {LONGEST_SIDE} pixels a side or "
            f"{MOST_PIXELS:,} pixels in all"
        )
