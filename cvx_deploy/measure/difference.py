"""How far one result is from another: a network's output, latents step by step, a whole video."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cvx_deploy.measure.thresholds import ForecastLimits, Thresholds

Video = NDArray[np.float32]  # (frames, height, width, 3) in [0, 1]
Array = NDArray[Any]
_TINY = 1e-300
_LARGEST_WINDOW = 7  # scikit-image's own default


@dataclass(frozen=True)
class Difference:
    """A tensor against the one it should be.

    Attributes:
        output: Its name.
        max_abs: Largest error.
        relative_max: The same over the largest value expected.
        relative_l2: L2 norm of the error over that of what was expected.
        cosine: Of the angle between the two.
        finite: Whether it is free of NaN and infinity; the other figures are infinite where it is not.
    """

    output: str
    max_abs: float
    relative_max: float
    relative_l2: float
    cosine: float
    finite: bool

    def beyond(self, limits: Thresholds) -> tuple[str, ...]:
        """Say which limits it breaks."""
        return tuple(self._broken(limits))

    def _broken(self, limits: Thresholds) -> Iterator[str]:
        if not self.finite:
            yield f"{self.output} is not finite"
            return
        for name in ("relative_max", "relative_l2"):
            value, limit = getattr(self, name), getattr(limits, name)
            if value > limit:
                yield f"{self.output}: {name} {value:.2e} is above {limit:.0e}"
        if self.cosine < limits.cosine:
            yield f"{self.output}: cosine {self.cosine:.6f} is below {limits.cosine:.6f}"


def difference(output: str, found: Array, expected: Array) -> Difference:
    """Compare two tensors; of another shape, nothing of the found one is right."""
    inf = float("inf")
    if found.shape != expected.shape or not np.isfinite(found).all():
        return Difference(output, inf, inf, inf, 0.0, finite=found.shape != expected.shape)
    one, other = (array.astype(np.float64).ravel() for array in (found, expected))
    lengths = float(np.linalg.norm(one)), float(np.linalg.norm(other))
    error = one - other
    max_abs = float(np.abs(error).max(initial=0.0))
    same = max_abs == 0.0
    return Difference(
        output,
        max_abs,
        0.0 if same else max_abs / max(float(np.abs(other).max()), _TINY),
        0.0 if same else float(np.linalg.norm(error)) / max(lengths[1], _TINY),
        1.0 if same else float(one @ other) / max(lengths[0] * lengths[1], _TINY),
        finite=True,
    )


def drift(found: Sequence[Array], expected: Sequence[Array]) -> tuple[float, ...]:
    """Return the relative L2 error of the latents after each step."""
    return tuple(difference("latents", one, other).relative_l2 for one, other in zip(found, expected, strict=True))


@dataclass(frozen=True)
class VideoDifference:
    """A video against the one it should be.

    Attributes:
        psnr: Peak signal-to-noise ratio in dB.
        ssim: Structural similarity, mean over the frames.
        flicker: Error of the change from one frame to the next, mean over pixels in [0, 1].
    """

    psnr: float
    ssim: float
    flicker: float

    def beyond(self, limits: Thresholds | ForecastLimits) -> tuple[str, ...]:
        """Say which limits it breaks."""
        broken = [
            f"{name} {getattr(self, name):.4g} is below {getattr(limits, name):g}"
            for name in ("psnr", "ssim")
            if not getattr(self, name) >= getattr(limits, name)
        ]
        if not self.flicker <= limits.flicker:
            broken.append(f"flicker {self.flicker:.2e} is above {limits.flicker:.0e}")
        return tuple(broken)


def video_difference(found: Video, expected: Video) -> VideoDifference:
    """Compare two videos of one size."""
    import skimage.metrics

    similarity: Callable[..., float] = skimage.metrics.structural_similarity
    window = min(_LARGEST_WINDOW, *found.shape[1:3])
    similar = [
        similarity(one, other, channel_axis=-1, data_range=1.0, win_size=window - (window % 2 == 0))
        for one, other in zip(found, expected, strict=True)
    ]
    changes = np.diff(found, axis=0) - np.diff(expected, axis=0)
    flicker = float(np.abs(changes).mean()) if changes.size else 0.0
    return VideoDifference(psnr(found, expected), float(np.mean(similar)), flicker)


def psnr(found: Video, expected: Video) -> float:
    """Return the peak signal-to-noise ratio in dB of pixels in [0, 1]; 200 for equal ones."""
    error = float(np.mean((found.astype(np.float64) - expected) ** 2))
    return float(-10 * np.log10(error + 1e-20))
