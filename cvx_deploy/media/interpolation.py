"""Frames between frames, by optical flow: a video at more frames a second than its model makes.

Between two frames the flow is found in both directions (OpenCV's DIS: T. Kroeger et al., "Fast Optical Flow using
Dense Inverse Search", arXiv:1603.03590). Each is projected to the moment that is wanted, as in section 3.3 of S. Baker
et al., "A Database and Evaluation Methodology for Optical Flow" (2011); both frames are warped there, and blended by
nearness in time. What one frame does not show, since something hides it there, is taken from the other alone.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np
from numpy.typing import NDArray

from cvx_deploy.errors import EngineError, MediaError
from cvx_deploy.install import pip_install

Frame = NDArray[np.float32]  # (H, W, 3), RGB in [0, 1]
Flow = NDArray[np.float32]  # (H, W, 2): x and y in pixels
METHOD = "optical flow (OpenCV DIS)"
_DOUBT = 1.5  # pixels by which a way there and back may miss before what went it counts as hidden
_SHARE = 0.05  # of the way itself by which it may miss besides
_STILL = 0.5  # pixels of flow that count as none: what does not move is then averaged, and no noise is carried about
_LEAST = 1e-3  # weight of what is hidden, where both frames hide it
_SMALL = 64  # pixels of the shorter side of a frame, below which flow is found at its full size


@dataclass(frozen=True)
class Rate:
    """How many frames a second there are, and are wanted.

    Output frame j lies at j / wanted seconds. Where a frame that was made lies there it is taken as it is; what comes
    last lies at or before the last frame that was made.

    Attributes:
        made: Frames a second of the video.
        wanted: Those of the result.

    Raises:
        MediaError: There are not more of them.
        EngineError: OpenCV is not installed.
    """

    made: int
    wanted: int

    def __post_init__(self) -> None:
        if self.wanted < self.made:
            raise MediaError(
                f"{self.wanted} frames a second are fewer than the {self.made} that the model makes",
                fix=f"use --fps {self.made} or more, or leave --fps out",
            )
        if self.wanted > self.made and find_spec("cv2") is None:
            raise EngineError(
                "frames between frames need OpenCV, which is not installed", fix=pip_install("interpolate")
            )

    @property
    def is_kept(self) -> bool:
        """Whether there are as many as are made."""
        return self.wanted == self.made

    def count(self, frames: int) -> int:
        """Return how many frames become of so many."""
        return (frames - 1) * self.wanted // self.made + 1

    def is_made(self, index: int) -> bool:
        """Whether an output frame is one that was made, not one between."""
        return index * self.made % self.wanted == 0


def check_rate(made: int, wanted: int | None) -> None:
    """Refuse a rate before the work; see `Rate`."""
    Rate(made, made if wanted is None else wanted)


class Interpolation:
    """Takes the frames of a video in order, and gives those at another rate; two frames are held at a time."""

    def __init__(self, rate: Rate) -> None:
        self._rate = rate
        self._last: Frame | None = None
        self._taken = self._given = 0

    def add(self, frames: NDArray[np.float32]) -> Iterator[NDArray[np.float32]]:
        """Yield what can be said once these have come, (1, H, W, 3) each."""
        for frame in frames:
            between: _Between | None = None
            while (place := self._given * self._rate.made) <= self._taken * self._rate.wanted:
                if self._last is None or self._rate.is_made(self._given):
                    yield frame[None]  # of the last one its own call has told
                else:
                    between = between or _Between(self._last, frame)
                    yield between.at(place / self._rate.wanted - (self._taken - 1))[None]
                self._given += 1
            self._last, self._taken = np.array(frame), self._taken + 1


class _Between:
    """The moments between two frames."""

    def __init__(self, first: Frame, second: Frame) -> None:
        self._frames = first, second
        there, back = _flow(first, second), _flow(second, first)
        self._flows = there, back
        self._hidden = _hidden(there, back), _hidden(back, there)

    def at(self, time: float) -> Frame:
        """Return the frame at a time from 0, the first, to 1, the second."""
        pixels, hidden = [], []
        for frame, flow, gone, way in zip(self._frames, self._flows, self._hidden, (time, 1 - time), strict=True):
            source = -way * _projected(flow, gone, way)
            pixels.append(_warped(frame, source))
            hidden.append(_warped(gone, source))
        # What is hidden in the second frame shows in the first alone.
        of_first = (1 - time) * np.maximum(1 - hidden[1], _LEAST)
        of_second = time * np.maximum(1 - hidden[0], _LEAST)
        share = (of_second / (of_first + of_second))[..., None]
        return np.clip(pixels[0] + share * (pixels[1] - pixels[0]), 0, 1).astype(np.float32)


def _flow(first: Frame, second: Frame) -> Flow:
    """Return for every pixel of the first frame how far what it shows is away in the second."""
    import cv2

    search = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    if min(first.shape[:2]) < _SMALL:
        search.setFinestScale(0)
    grey = [cv2.cvtColor((frame * 255).round().astype(np.uint8), cv2.COLOR_RGB2GRAY) for frame in (first, second)]
    flow = np.asarray(search.calc(grey[0], grey[1], None), np.float32)
    return np.where(np.linalg.norm(flow, axis=-1, keepdims=True) < _STILL, np.float32(0), flow)


def _hidden(there: Flow, back: Flow) -> NDArray[np.float32]:
    """Return where a pixel has nothing to go to: the way back from where it went does not lead home, (H, W) in 0, 1."""
    missed = np.linalg.norm(there + _warped(back, there), axis=-1)
    allowed = _DOUBT + _SHARE * np.linalg.norm(there, axis=-1)
    return np.asarray(missed > allowed, np.float32)


def _projected(flow: Flow, hidden: NDArray[np.float32], time: float) -> Flow:
    """Return the flow as the pixels of a moment have it, each taken along by the pixels that pass it."""
    import cv2

    height, width = flow.shape[:2]
    y, x = np.mgrid[:height, :width]
    to_x = np.rint(x + time * flow[..., 0]).astype(np.int64).clip(0, width - 1)
    to_y = np.rint(y + time * flow[..., 1]).astype(np.int64).clip(0, height - 1)
    place = (to_y * width + to_x).ravel()
    weight = np.maximum(1 - hidden, _LEAST).ravel()
    sums = [np.bincount(place, weight * part.ravel(), height * width) for part in (flow[..., 0], flow[..., 1])]
    whole = np.bincount(place, weight, height * width)
    planes = np.stack([*sums, whole], axis=-1).reshape(height, width, 3).astype(np.float32)
    spread = cv2.blur(planes, (3, 3))
    wide = cv2.blur(planes, (15, 15))
    known, near = planes[..., 2:] > 0, spread[..., 2:] > 0
    chosen = np.where(known, planes, np.where(near, spread, wide))
    return np.asarray(chosen[..., :2] / np.maximum(chosen[..., 2:], 1e-9), np.float32)


def _warped(image: NDArray[np.float32], flow: Flow) -> NDArray[np.float32]:
    """Return at each pixel what the image shows where the flow leads."""
    import cv2

    height, width = flow.shape[:2]
    y, x = np.mgrid[:height, :width].astype(np.float32)
    mapped = cv2.remap(image, x + flow[..., 0], y + flow[..., 1], cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    return np.asarray(mapped, np.float32)
