"""Sinusoidal features of a timestep."""

import math
from typing import Any

import torch
from numpy.typing import NDArray

from cvx_deploy.exporters.tracing.contract import as_numpy

_MAX_PERIOD = 10_000


class TimestepTable(torch.nn.Module):
    """Sinusoidal timestep features from a table of frequencies, as diffusers' `Timesteps` computes them.

    At timestep 999 the rounding of another engine's ``exp`` would already turn an angle by 1e-4.
    """

    freqs: torch.Tensor

    def __init__(self, channels: int, flip_sin_to_cos: bool) -> None:
        super().__init__()
        self.flip_sin_to_cos = flip_sin_to_cos
        self.register_buffer("freqs", torch.zeros(channels // 2, dtype=torch.float32), persistent=False)

    def forward(self, timestep: torch.Tensor) -> torch.Tensor:
        """Return features ``(B, channels)`` in float32 for ``timestep (B,)``."""
        angle = timestep[:, None].float() * self.freqs[None, :]
        sin, cos = angle.sin(), angle.cos()
        return torch.cat([cos, sin] if self.flip_sin_to_cos else [sin, cos], dim=-1)


def frequencies(channels: int, shift: float) -> NDArray[Any]:
    """Return the frequencies of diffusers' `get_timestep_embedding`, computed by torch as it does."""
    half = channels // 2
    exponent = -math.log(_MAX_PERIOD) * torch.arange(half, dtype=torch.float32) / (half - shift)
    return as_numpy(exponent.exp())
