"""The miniature's world: short videos of one coloured shape that moves, grows, shrinks or stays, drawn by formula.

Everything follows from a seed. Lengths are fractions of the frame's side, so that one scene can be drawn at any size.
"""

from dataclasses import dataclass
from itertools import product
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Split = Literal["train", "held-out"]

FRAMES = 9
SIDE = 48
FPS = 8

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.88, 0.10, 0.10),
    "green": (0.10, 0.66, 0.16),
    "blue": (0.12, 0.22, 0.90),
    "yellow": (0.96, 0.86, 0.08),
    "purple": (0.58, 0.12, 0.72),
    "cyan": (0.10, 0.82, 0.88),
}
BACKGROUNDS: dict[str, float] = {"white": 0.96, "black": 0.05, "gray": 0.50}
SHAPES = ("circle", "square", "triangle")
SIZES: dict[str, tuple[float, float]] = {"small": (0.125, 0.155), "medium": (0.155, 0.185), "large": (0.185, 0.22)}
DIRECTIONS: dict[str, tuple[float, float]] = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
MOTIONS = (*DIRECTIONS, "growing", "shrinking", "still")

# Half-widths of a shape of size 1 about its centre: left, right, up, down. Areas are alike, so size means size.
_SQUARE = 0.89
_TRIANGLE = 1.45
_EXTENTS: dict[str, tuple[float, float, float, float]] = {
    "circle": (1.0, 1.0, 1.0, 1.0),
    "square": (_SQUARE, _SQUARE, _SQUARE, _SQUARE),
    "triangle": (_TRIANGLE * 0.866, _TRIANGLE * 0.866, _TRIANGLE, _TRIANGLE * 0.5),
}
_TRAVEL = (0.28, 0.38)
_GROWTH = (1.7, 2.0)
_MARGIN = 0.025

Combination = tuple[str, str, str]


@dataclass(frozen=True)
class Scene:
    """One video before it is drawn.

    Attributes:
        shape: One of `SHAPES`.
        colour: One of `COLOURS`.
        motion: One of `MOTIONS`.
        size: One of `SIZES`.
        background: One of `BACKGROUNDS`.
        tint: The shape's colour as drawn, RGB in [0, 1].
        shade: The background's gray at the top and at the bottom edge, in [0, 1].
        path: Centre (x, y) in the first and in the last frame, as fractions of the side.
        radii: Size in the first and in the last frame, likewise.
    """

    shape: str
    colour: str
    motion: str
    size: str
    background: str
    tint: tuple[float, float, float]
    shade: tuple[float, float]
    path: tuple[tuple[float, float], tuple[float, float]]
    radii: tuple[float, float]

    @property
    def combination(self) -> Combination:
        """Shape, colour and motion: what a caption always says and the judge measures."""
        return self.shape, self.colour, self.motion


def combinations(split: Split) -> tuple[Combination, ...]:
    """List the (shape, colour, motion) combinations of `split`; one in seven is held out of training.

    The held-out ones lie on a diagonal of the table, so that training sees each shape with each colour, each shape
    with each motion and each colour with each motion, only not all three at once.
    """
    table = product(enumerate(SHAPES), enumerate(COLOURS), enumerate(MOTIONS))
    return tuple((s, c, m) for (i, s), (j, c), (k, m) in table if ((2 * i + j + k) % 7 == 0) == (split == "held-out"))


def random_scene(rng: np.random.Generator, split: Split) -> Scene:
    """Draw one scene whose combination belongs to `split`."""
    choices = combinations(split)
    shape, colour, motion = choices[rng.integers(len(choices))]
    size = str(rng.choice(list(SIZES)))
    background = str(rng.choice(list(BACKGROUNDS)))
    radius = rng.uniform(*SIZES[size])
    path = _random_path(rng, shape, motion, radius)
    gray = BACKGROUNDS[background] + rng.uniform(-0.03, 0.03)
    slope = rng.uniform(-0.05, 0.05) if rng.random() < 0.5 else 0.0
    tint = np.asarray(COLOURS[colour]) + rng.uniform(-0.05, 0.05, 3)
    return Scene(
        shape=shape,
        colour=colour,
        motion=motion,
        size=size,
        background=background,
        tint=tuple(np.clip(tint, 0, 1).tolist()),
        shade=(float(np.clip(gray - slope, 0, 1)), float(np.clip(gray + slope, 0, 1))),
        path=path,
        radii=_radii(rng, motion, radius),
    )


def _radii(rng: np.random.Generator, motion: str, radius: float) -> tuple[float, float]:
    """Sizes in the first and last frame; `radius` is the larger one."""
    smaller = radius / rng.uniform(*_GROWTH)
    return {"growing": (smaller, radius), "shrinking": (radius, smaller)}.get(motion, (radius, radius))


def _random_path(
    rng: np.random.Generator, shape: str, motion: str, radius: float
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Centres in the first and last frame such that the shape stays inside the frame."""
    left, right, up, down = (radius * extent + _MARGIN for extent in _EXTENTS[shape])
    dx, dy = DIRECTIONS.get(motion, (0, 0))
    travel = rng.uniform(*_TRAVEL)
    step_x, step_y = dx * travel, dy * travel
    x = rng.uniform(left + max(-step_x, 0), 1 - right - max(step_x, 0))
    y = rng.uniform(up + max(-step_y, 0), 1 - down - max(step_y, 0))
    return (x, y), (x + step_x, y + step_y)


def signed_distance(
    shape: str, x: NDArray[np.floating], y: NDArray[np.floating], radius: NDArray[np.floating] | float
) -> NDArray[np.floating]:
    """Distance to the outline of a shape centred at the origin, negative inside; exact along the straight edges."""
    if shape == "circle":
        return np.hypot(x, y) - radius
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - _SQUARE * radius
    slanted = np.abs(x) * (np.sqrt(3) / 2) - y / 2
    return np.maximum(slanted, y) - _TRIANGLE / 2 * radius


def video_of(scene: Scene, *, frames: int = FRAMES, side: int = SIDE) -> NDArray[np.float32]:
    """Draw a scene, anti-aliased over one pixel: float32 (frames, side, side, 3) in [0, 1]."""
    time = np.linspace(0, 1, frames)[:, None, None]
    (x0, y0), (x1, y1) = scene.path
    pixel = (np.arange(side) + 0.5) / side
    x = pixel[None, None, :] - (x0 + (x1 - x0) * time)
    y = pixel[None, :, None] - (y0 + (y1 - y0) * time)
    radius = scene.radii[0] + (scene.radii[1] - scene.radii[0]) * time
    cover = np.clip(0.5 - side * signed_distance(scene.shape, x, y, radius), 0, 1)[..., None]
    top, bottom = scene.shade
    backdrop = (top + (bottom - top) * pixel)[None, :, None, None]
    return (backdrop + cover * (np.asarray(scene.tint) - backdrop)).astype(np.float32)


def videos_of(scenes: list[Scene], *, frames: int = FRAMES, side: int = SIDE) -> NDArray[np.float32]:
    """Draw several scenes: float32 (scenes, frames, side, side, 3) in [0, 1]."""
    return np.stack([video_of(scene, frames=frames, side=side) for scene in scenes])


def random_scenes(seed: tuple[int, ...], count: int, split: Split) -> list[Scene]:
    """Draw `count` scenes of `split` from a seed, the same ones every time."""
    rng = np.random.default_rng(seed)
    return [random_scene(rng, split) for _ in range(count)]
