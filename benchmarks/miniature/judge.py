"""A judge without learning in it: the shape, the colour and the motion of a video, measured from its pixels.

The background is a plane fitted to each frame's border; what differs from it is the object. Its colour is the hue of
its core, its motion the trend of its centre and area, its shape the drawn outline of equal area that fits best.
"""

import colorsys
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from world import COLOURS, DIRECTIONS, SHAPES, signed_distance

# An object covers at least this share of the frame, in at least half of the frames; less counts as nothing there.
_LEAST_AREA = 0.006
# Travel below this share of the side is no movement; growth below this factor is no growth.
_LEAST_TRAVEL = 0.10
_LEAST_GROWTH = 1.35
_LEAST_CONTRAST = 0.12

Video = NDArray[np.floating]  # (frames, height, width, 3) in [0, 1]


@dataclass(frozen=True)
class Verdict:
    """What a video shows; None where nothing can be told.

    Attributes:
        shape: One of `world.SHAPES`.
        colour: One of `world.COLOURS`.
        motion: One of `world.MOTIONS`.
    """

    shape: str | None
    colour: str | None
    motion: str | None


@dataclass(frozen=True)
class _Track:
    """The object, frame by frame: cover (F, H, W) in [0, 1], area in pixels, centre (F, 2) as x, y in pixels."""

    cover: NDArray[np.float64]
    area: NDArray[np.float64]
    centre: NDArray[np.float64]


def verdict_on(video: Video, colours: Mapping[str, tuple[float, float, float]] = COLOURS) -> Verdict:
    """Measure what a video shows; `colours` are those that it may name, RGB in [0, 1]."""
    track = _track(video)
    seen = track.area >= _LEAST_AREA * video.shape[1] * video.shape[2]
    if seen.mean() < 0.5:
        return Verdict(None, None, None)
    return Verdict(_shape(track, seen), _colour(video, track, seen, colours), _motion(track, seen, video.shape[1]))


def _track(video: Video) -> _Track:
    """Find the object in each frame as its difference from the background, full where it differs most."""
    difference = np.linalg.norm(video - _background(video), axis=-1)
    # The core's contrast: a high quantile over the frames, so that one odd pixel does not set the scale.
    peak = max(float(np.quantile(difference.max(axis=(1, 2)), 0.5)), 1e-6)
    cover = np.clip((difference / peak - 0.15) / 0.6, 0, 1) if peak > _LEAST_CONTRAST else np.zeros_like(difference)
    area = cover.sum(axis=(1, 2))
    y, x = np.mgrid[: video.shape[1], : video.shape[2]] + 0.5
    whole = np.maximum(area, 1e-6)
    centre = np.stack([(cover * x).sum(axis=(1, 2)) / whole, (cover * y).sum(axis=(1, 2)) / whole], axis=1)
    return _Track(cover, area, centre)


def _background(video: Video) -> NDArray[np.float64]:
    """Fit value = a + b x + c y to the border of the whole video, robustly: once, then without what stands out."""
    frames, height, width, _ = video.shape
    y, x = np.mgrid[:height, :width]
    border = (y < 1) | (y >= height - 1) | (x < 1) | (x >= width - 1)
    plane = np.stack([np.ones(height * width), x.ravel() / width - 0.5, y.ravel() / height - 0.5], axis=1)
    basis = np.tile(plane[border.ravel()], (frames, 1))
    values = video[:, border].reshape(-1, 3).astype(np.float64)
    keep = np.abs(values - np.median(values, axis=0)).max(axis=1) < 0.2
    fit = np.linalg.lstsq(basis[keep], values[keep], rcond=None)[0]
    return (plane @ fit).reshape(1, height, width, 3)


def _colour(
    video: Video, track: _Track, seen: NDArray[np.bool_], colours: Mapping[str, tuple[float, float, float]]
) -> str | None:
    """Name the hue of the object's core; None for something gray."""
    core = track.cover[seen] > 0.9
    tint = np.median(video[seen][core], axis=0).clip(0, 1)
    hue, saturation, _ = colorsys.rgb_to_hsv(*tint)
    if saturation < 0.25:
        return None
    distance = {name: abs((hue - colorsys.rgb_to_hsv(*rgb)[0] + 0.5) % 1 - 0.5) for name, rgb in colours.items()}
    return min(distance, key=distance.__getitem__)


def _motion(track: _Track, seen: NDArray[np.bool_], side: int) -> str | None:
    """Tell travel from growth from rest by straight-line trends over the frames; None for a mixture of them."""
    time = np.linspace(0, 1, len(seen))[seen]
    travel = np.polyfit(time, track.centre[seen] / side, 1)[0]
    # Linear size, not area: it changes in a straight line.
    size = np.sqrt(track.area[seen])
    slope, start = np.polyfit(time, size, 1)
    growth = max(start + slope, 1e-3) / max(start, 1e-3)
    moves = float(np.hypot(*travel)) > _LEAST_TRAVEL
    if max(growth, 1 / growth) > _LEAST_GROWTH:
        return None if moves else ("growing" if growth > 1 else "shrinking")
    if not moves:
        return "still"
    unit = travel / np.hypot(*travel)
    way = max(DIRECTIONS, key=lambda name: float(unit @ DIRECTIONS[name]))
    return way if unit @ DIRECTIONS[way] > 0.9 else None


def _shape(track: _Track, seen: NDArray[np.bool_]) -> str:
    """Draw each shape with the object's area and centre, and name the one that covers it best over all frames."""
    error = dict.fromkeys(SHAPES, 0.0)
    for cover, area, centre in zip(track.cover[seen], track.area[seen], track.centre[seen], strict=True):
        for shape in SHAPES:
            error[shape] += _misfit(shape, cover, area, centre)
    return min(error, key=error.__getitem__)


def _misfit(shape: str, cover: NDArray[np.float64], area: float, centre: NDArray[np.float64]) -> float:
    """Squared difference of cover and template, as a share of the area; the best of a few sizes."""
    y, x = np.mgrid[: cover.shape[0], : cover.shape[1]] + 0.5
    radius = np.sqrt(area / _UNIT_AREA[shape])
    errors = []
    for scale in (0.94, 1.0, 1.06):
        outline = signed_distance(shape, x - centre[0], y - centre[1], radius * scale)
        errors.append(np.square(cover - np.clip(0.5 - outline, 0, 1)).sum())
    return float(min(errors) / area)


def _unit_areas() -> dict[str, float]:
    """The area of each shape at size 1, counted on a fine grid."""
    grid = np.linspace(-2, 2, 801)
    x, y = np.meshgrid(grid, grid)
    return {shape: float((signed_distance(shape, x, y, 1.0) < 0).mean() * 16) for shape in SHAPES}


_UNIT_AREA = _unit_areas()
