"""Videos longer or larger than a bundle's shape, by windows of that shape which overlap, at every step.

The transformer sees one window after another, with that window's own positions; what it says of them is averaged, and
the sampler takes its step with the average, so that windows agree more with every step: MultiDiffusion
(arXiv:2302.08113) in space, and the fused windows of FreeNoise (arXiv:2310.15169) in time. Weights fall in a straight
line from a window's middle to its ends, as FreeNoise's do: what a window says near its end was said without sight of
what lies beyond, and where a window ends the average must not jump. They are those of one axis multiplied by those of
the others.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from math import ceil
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cvx_deploy.bounds import check_video
from cvx_deploy.bundle.opened import Bundle
from cvx_deploy.errors import CvxError, ShapeError
from cvx_deploy.pipeline.axis import Axis
from cvx_deploy.pipeline.noise import Generator
from cvx_deploy.pipeline.shapes import ShapeChoice, bundle_at, latents_header, shape_of_latents
from cvx_deploy.shape import Shape

Latents = NDArray[np.float32]  # (B, F, C, H, W)
_SHARED = 0.25
"""The least share of a window that its neighbour in space has, too."""
_MOST_AT_ONCE = 64


@dataclass(frozen=True)
class Windows:
    """A video that is made by windows.

    Attributes:
        shape: Its size.
        overlap: Video frames that a window and the next one share at the least; None for half of a window.
        freenoise: Whether later frames start from the noise of earlier ones, shuffled (arXiv:2310.15169).
        loop: Whether its end leads back to its beginning.
        at_once: How many windows go through the transformer together, each with both branches of guidance.
    """

    shape: Shape
    overlap: int | None = None
    freenoise: bool = False
    loop: bool = False
    at_once: int = 1


@dataclass(frozen=True)
class _Cut:
    """A window of latents: the places it takes of each axis, and what it counts for there, (F, 1, H, W)."""

    frames: NDArray[np.int64]
    rows: slice
    columns: slice
    weights: NDArray[np.float32]


@dataclass(frozen=True)
class Plan:
    """How a video's latents are cut into windows: into one, where the bundle has the video's own shape.

    Attributes:
        shape: The video's; `window` the bundle's.
        frames: The axis of latent frames, padding included; `rows` and `columns` likewise.
        channels: Of the latents.
        padding: Latent frames in front that are no part of the video.
        temporal: Video frames that a latent frame spans.
        freenoise: See `Windows`; `at_once` likewise, and no more than there are.
    """

    shape: Shape
    window: Shape
    frames: Axis
    rows: Axis
    columns: Axis
    channels: int
    padding: int
    temporal: int
    freenoise: bool = False
    at_once: int = 1

    @property
    def latent_shape(self) -> tuple[int, int, int, int, int]:
        """The whole latents' (B, F, C, H, W), padding included."""
        return 1, self.frames.length, self.channels, self.rows.length, self.columns.length

    @property
    def count(self) -> int:
        """How many windows there are at each step."""
        return len(self.frames.starts) * len(self.rows.starts) * len(self.columns.starts)

    @property
    def plane(self) -> tuple[Axis, Axis] | None:
        """How frames are cut into windows; None where one window holds all of a frame."""
        return (self.rows, self.columns) if len(self.rows.starts) * len(self.columns.starts) > 1 else None

    @property
    def _odd(self) -> int:
        """Whether the VAE's first chunk has an odd count of latent frames, of which the first is one video frame."""
        return self.window.frames % 2

    @property
    def _context(self) -> int:
        """How many latent frames a loop is decoded after, which are its own last ones: 2, or 3 for the VAE's chunks."""
        return 2 + (self.frames.length + self._odd) % 2 if self.frames.ring else 0

    @property
    def context_frames(self) -> int:
        """How many frames are decoded of latents that come before the video's own."""
        return self.temporal * (self._context - self._odd) + self._odd if self._context else 0

    def with_context(self, latents: Latents) -> Latents:
        """Return finished latents (videos, F, C, H, W) as the VAE decodes them: a loop's after its own end.

        The VAE is causal, and makes one frame of its first latent frame, or knows none before it. In a loop no frame is
        the first.
        """
        return np.concatenate([latents[:, -self._context :], latents], axis=1) if self._context else latents

    def averaged(self, turn: int, whole: Latents, say: Callable[[Latents], Latents]) -> Latents:
        """Return the weighted average of what `say` says of every window, (B', F, C', H, W).

        Args:
            turn: Which step it is.
            whole: (B, F, C, H, W).
            say: Takes as many windows of it as are shown at once, and returns something of their size, but for channels
                and for the branches of each window, one after the other, in its place.
        """
        if self.count == 1 and not self.frames.ring:
            return say(whole)
        cuts = self._cuts(turn)
        average: Latents | None = None
        for start in range(0, len(cuts), self.at_once):
            group = cuts[start : start + self.at_once]
            parts = [whole[:, cut.frames, :, cut.rows, cut.columns] for cut in group]
            said = say(np.concatenate(parts + parts[-1:] * (self.at_once - len(group))))
            each = said.reshape(self.at_once, -1, *said.shape[1:])
            if average is None:
                average = np.zeros((each.shape[1], len(whole[0]), said.shape[2], *whole.shape[3:]), np.float32)
            for cut, one in zip(group, each, strict=False):
                average[:, cut.frames, :, cut.rows, cut.columns] += cut.weights * one
        assert average is not None
        return average

    def _cuts(self, turn: int) -> list["_Cut"]:
        across = product(self.frames.cuts(turn), self.rows.cuts(), self.columns.cuts())
        return [
            _Cut(
                frames,
                slice(rows[0], rows[-1] + 1),
                slice(columns[0], columns[-1] + 1),
                in_time[:, None, None, None] * in_height[:, None] * in_width,
            )
            for (frames, in_time), (rows, in_height), (columns, in_width) in across
        ]

    def noise(self, generator: Generator) -> Latents:
        """Draw what the video starts from; with FreeNoise later frames are earlier ones, shuffled.

        The rule is the paper's: each stretch of as many frames as windows are apart is the one that lies a window
        before it, in another order. Frames that a transformer takes together stay together.
        """
        frames = self.frames
        if not self.freenoise or frames.length <= frames.window:
            return generator.randn(self.latent_shape)
        batch, _, *rest = self.latent_shape
        drawn = generator.randn((batch, frames.window, *rest))
        order = np.arange(frames.window).reshape(-1, frames.period)
        stride, length = max(frames.starts[1] // frames.period, 1), frames.length // frames.period
        window = len(order)
        for start in range(window, length, stride):
            stretch = order[start - window : min(start + stride, length) - window]
            order = np.concatenate([order, stretch[np.argsort(generator.randn((len(stretch),)))]])
        return drawn[:, order.reshape(-1)]

    @property
    def as_json(self) -> dict[str, object]:
        """What a report says of it: the windows' size, and where they begin along each axis, in latents."""
        starts = {"frames": self.frames.starts, "rows": self.rows.starts, "columns": self.columns.starts}
        return {
            "of": str(self.window),
            "count": self.count,
            **starts,
            "freenoise": self.freenoise,
            "loop": self.frames.ring,
        }

    def __str__(self) -> str:
        axes = {"time": self.frames, "height": self.rows, "width": self.columns}
        parts = [f"{len(axis.starts)} in {name}" for name, axis in axes.items() if len(axis.starts) > 1]
        by = f" ({', '.join(parts)})" if len(parts) > 1 else ""
        return f"{self.count} window{'s' * (self.count > 1)} of {self.window}{by}"


def plan_for(bundle: Bundle, windows: Windows | None) -> Plan:
    """Return how latents are cut for a bundle's own shape, or for the larger video that is asked for.

    Raises:
        ShapeError: The bundle's windows cannot make it.
    """
    vae, window = bundle.manifest.vae, bundle.shape
    period = bundle.manifest.traits.patch_size_t or 1
    wanted = Windows(window) if windows is None else windows
    _check(bundle, wanted)
    latents = -(-window.frames // vae.temporal)
    inside = latents - latents % -period
    whole = _latent_frames(wanted, window, vae.temporal)
    length = whole - whole % -period
    overlap = inside // 2 if wanted.overlap is None else ceil(wanted.overlap / vae.temporal)
    rows, columns = (
        Axis.of(side // vae.spatial, own // vae.spatial, ceil(_SHARED * own / vae.spatial))
        for side, own in ((wanted.shape.height, window.height), (wanted.shape.width, window.width))
    )
    plan = Plan(
        wanted.shape,
        window,
        Axis.of(length, inside, -(-overlap // period) * period, period, ring=wanted.loop),
        rows,
        columns,
        channels=vae.latent_channels,
        padding=length - whole,
        temporal=vae.temporal,
        freenoise=wanted.freenoise,
    )
    return replace(plan, at_once=min(wanted.at_once, plan.count))


def bundle_and_windows(
    bundle: Bundle,
    wanted: ShapeChoice,
    from_latents: Path | None = None,
    *,
    overlap: int | None = None,
    freenoise: bool = False,
    loop: bool = False,
    at_once: int = 1,
) -> tuple[Bundle, Windows | None]:
    """Return the bundle seen at the shape that is wanted, or at the largest that fits into it, and its windows.

    Args:
        bundle: At any shape.
        wanted: The video's size.
        from_latents: A file with its finished latents, whose size it has then.
        overlap: See `Windows`; `freenoise`, `loop` and `at_once` likewise.

    Raises:
        ShapeError: The bundle has no such shape, and none that fits; or its windows cannot make it.
        MediaError: The file holds no latents.
        CvxError: How windows overlap is said, and there is one.
    """
    if from_latents is not None:
        held = shape_of_latents(latents_header(from_latents), bundle)
        if held is None or held in bundle.shapes or not wanted.admits(held):
            return bundle_at(bundle, wanted, from_latents), None
        wanted = ShapeChoice(held.frames, held.height, held.width)
    exact = next(filter(wanted.admits, bundle.shapes), None)
    if exact is not None and not loop:
        words = {"--overlap": overlap is not None, "--freenoise": freenoise, "--windows-at-once": at_once != 1}
        word = next((word for word, is_given in words.items() if is_given), None)
        if word is not None:
            raise CvxError(f"{word} means nothing: the bundle makes {exact} in one window", fix=f"leave {word} out")
        return bundle.at(exact), None
    within = [shape for shape in bundle.shapes if _fits(shape, wanted.filled_up(shape), loop)]
    if not within:
        return bundle_at(bundle, wanted, from_latents), None  # says which shapes there are
    largest = bundle.at(max(within, key=lambda shape: (shape.height * shape.width, shape.frames)))
    shape = wanted.filled_up(largest.shape)
    if loop and wanted.frames is None:
        shape = replace(shape, frames=_least_loop(largest))
    windows = Windows(shape, overlap, freenoise, loop, at_once)
    plan_for(largest, windows)
    return largest, windows


def _fits(inner: Shape, outer: Shape, loop: bool) -> bool:
    """Whether a window fits into a video; how long a loop must be is said later."""
    return (loop or inner.frames <= outer.frames) and inner.height <= outer.height and inner.width <= outer.width


def _least_loop(bundle: Bundle) -> int:
    """Return the frames of the shortest loop."""
    period = _loop_period(bundle)
    return -(-bundle.shape.frames // period) * period


def _loop_period(bundle: Bundle) -> int:
    return bundle.manifest.vae.temporal * (bundle.manifest.traits.patch_size_t or 1)


def _latent_frames(wanted: Windows, window: Shape, temporal: int) -> int:
    """Return the fewest latent frames that the VAE decodes to so many frames, in the chunks the window has."""
    frames = wanted.shape.frames
    if wanted.loop:
        return frames // temporal
    if window.frames % (2 * temporal) == 1:
        return 2 * ceil((frames - 1) / (2 * temporal)) + 1
    return 2 * ceil(frames / (2 * temporal))


def _check(bundle: Bundle, wanted: Windows) -> None:
    shape, window, vae = wanted.shape, bundle.shape, bundle.manifest.vae
    for name in ("height", "width"):
        side, own = getattr(shape, name), getattr(window, name)
        if side < own:
            raise ShapeError(f"{name} {side} is less than a window's, {own}", fix=f"use --{name} {own} or more")
        if side % vae.spatial:
            near = side // vae.spatial * vae.spatial
            raise ShapeError(
                f"{name} {side} is not a multiple of {vae.spatial}", fix=f"use --{name} {near} or {near + vae.spatial}"
            )
    if shape.frames < window.frames and not wanted.loop:
        raise ShapeError(
            f"{shape.frames} frames are less than a window's, {window.frames}", fix=f"use --frames {window.frames}"
        )
    try:
        check_video(shape.frames, shape.height, shape.width)
    except ValueError as error:
        raise ShapeError(str(error), fix="ask for fewer frames, or a smaller frame") from error
    period, least = _loop_period(bundle), _least_loop(bundle)
    if wanted.loop and (shape.frames % period or shape.frames < least):
        near = max(-(-shape.frames // period) * period, least)
        raise ShapeError(
            f"a loop of {shape.frames} frames: it has a multiple of {period}, and {least} or more",
            fix=f"use --frames {near}",
        )
    if window.frames <= vae.temporal and shape.frames > window.frames:
        raise ShapeError(f"windows of {window.frames} frames share none", fix="use a shape of more frames")
    if not 1 <= wanted.at_once <= _MOST_AT_ONCE:
        raise ShapeError(f"{wanted.at_once} windows at once", fix=f"use --windows-at-once from 1 to {_MOST_AT_ONCE}")
    most = least - period
    if wanted.overlap is not None and not 0 <= wanted.overlap <= most:
        raise ShapeError(
            f"windows of {window.frames} frames cannot share {wanted.overlap}", fix=f"use --overlap from 0 to {most}"
        )
