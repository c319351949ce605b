"""What happens while videos are made: a run is a generator of these, in this order."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cvx_deploy.pipeline.resume import ResumePoint


@dataclass(frozen=True)
class Step:
    """A denoising step that has been taken.

    Attributes:
        video: Whose, from 0.
        index: Which of the steps that this video takes, from 0; `count` is how many there are.
        timestep: The scheduler's, falling from about 999.
        latents: What they are after it, float32 (1, F, C, H, W), padded frames first where the model has some.
        forecast: Whether what the transformer would say was foretold, and it was not run.
        point: Where a run can go on that ends here; None where steps are forecast, since forecasts are not kept.
    """

    video: int
    index: int
    count: int
    timestep: int
    latents: NDArray[np.float32]
    forecast: bool = False
    point: ResumePoint | None = None


@dataclass(frozen=True)
class Denoised:
    """Every video's latents are finished, float32 (videos, F, C, H, W), without padding."""

    latents: NDArray[np.float32]


@dataclass(frozen=True)
class Frames:
    """The next frames of a video are decoded.

    Attributes:
        video: Whose, from 0.
        start: The number of the first of these.
        frames: float32 (n, height, width, 3), RGB in [0, 1].
    """

    video: int
    start: int
    frames: NDArray[np.float32]


Event = Step | Denoised | Frames
