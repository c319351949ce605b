"""RIFLEx (arXiv:2502.15894): one temporal frequency of rotary positions is lowered, for videos longer than trained.

Of the frequencies along time, one has the first period that is at least as long as the videos trained on; beyond that
period frames get the positions of earlier ones again, and the video repeats itself. Equation 8 lowers that frequency
until the longer video lies within one period: within 0.9 of it, as the authors' code has it. No weight changes.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cvx_deploy.bundle.schema import Riflex
from cvx_deploy.errors import ShapeError
from cvx_deploy.families.cogvideox.models import positions_of

_BASE = 10_000.0
"""Of the rotary frequencies: diffusers' ``theta``."""
_WITHIN = 0.9


def riflex_for(config: Mapping[str, Any], tokens: int) -> Riflex | None:
    """Return what is changed for a video of so many tokens along time; None where it is within one period as it is.

    Args:
        config: ``transformer/config.json``.
        tokens: Latent frames, or those over ``patch_size_t``.
    """
    component = _intrinsic(config)
    if component is None or tokens <= _period(config, component):
        return None
    return Riflex(component + 1, tokens)


def check_riflex(config: Mapping[str, Any], tokens: Mapping[str, int]) -> None:
    """Refuse it where it changes nothing.

    Args:
        config: ``transformer/config.json``.
        tokens: Tokens along time of each shape, by the shape's name.

    Raises:
        ShapeError: The model has no rotary positions, or no shape is long enough.
    """
    if positions_of(dict(config)) == "sincos":
        raise ShapeError(
            "this model has no rotary positions, and RIFLEx changes one of their frequencies",
            fix="leave out --riflex, or use a 5b model",
        )
    if any(riflex_for(config, count) is not None for count in tokens.values()):
        return
    component = _intrinsic(config)
    if component is None:
        raise ShapeError("no frequency of this model has a period as long as its videos", fix="leave out --riflex")
    period = _period(config, component)
    least = 2 * math.ceil(math.floor(period) * (config.get("patch_size_t") or 1) / 2) + 1
    frames = config.get("temporal_compression_ratio", 4) * (least - 1) + 1
    raise ShapeError(
        f"{', '.join(tokens)}: positions repeat after {period:.3g} tokens along time, and there are no more than "
        f"{max(tokens.values())}",
        fix=f"leave out --riflex, or use --frames {frames} or more",
    )


def lowered(axis: NDArray[Any], riflex: Riflex, function: np.ufunc) -> NDArray[Any]:
    """Return the axis of time of a rotary table (tokens, channels) with the frequency lowered.

    Args:
        axis: Cosines, or sines.
        riflex: What is changed.
        function: `numpy.cos`, or `numpy.sin`.
    """
    frequency = np.float32(_WITHIN * 2 * math.pi / riflex.tokens)
    values = function(np.arange(len(axis), dtype=np.float32) * frequency)
    changed = axis.copy()
    first = 2 * (riflex.component - 1)
    changed[:, first : first + 2] = values[:, None]  # a frequency has two channels, side by side
    return changed


def _intrinsic(config: Mapping[str, Any]) -> int | None:
    """Return the place of the first frequency whose period is as long as the videos trained on, from 0."""
    ratio, patch = config.get("temporal_compression_ratio", 4), config.get("patch_size_t") or 1
    trained = -(-((config["sample_frames"] - 1) // ratio + 1) // patch)
    count = config["attention_head_dim"] // 4 // 2
    return next((place for place in range(count) if _period(config, place) >= trained), None)


def _period(config: Mapping[str, Any], place: int) -> float:
    """Return after how many tokens a temporal frequency comes around."""
    channels = config["attention_head_dim"] // 4
    return 2 * math.pi * float(_BASE ** (2 * place / channels))
