"""A long video as a chain of clips, each of which starts from the last frames of the one before.

The first is of any model; those that follow are of an image-to-video model, whose image is a frame of the clip before.
What two clips share is shown once: with one frame it is the earlier clip's, with more they are blended into each other.
"""

from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cvx_deploy.errors import CvxError, PromptError, ShapeError
from cvx_deploy.longer.match import Levels, levels_of, matched
from cvx_deploy.longer.plan import Clip, Lengths, clips_of
from cvx_deploy.media.encoders import as_bytes
from cvx_deploy.pipeline.events import Event, Frames, Step
from cvx_deploy.pipeline.pipeline import Pipeline

Pixels = NDArray[np.uint8]  # (n, H, W, 3)
_PIECE = 8  # frames that are given at a time
OF_THE_FIRST = ("image", "video", "strength")
OF_ONE_VIDEO = ("generator", "latents", "prompt_embeds", "negative_prompt_embeds", "resume", "num_videos_per_prompt")


@dataclass(frozen=True)
class ClipMade:
    """A clip is whole.

    Attributes:
        clip: Which.
        pixels: All of its frames, in the colours of the chain; those that it shares with the clip before, too.
    """

    clip: Clip
    pixels: Pixels


@dataclass(frozen=True)
class Chain:
    """Two pipelines that make one long video.

    Attributes:
        first: Makes the first clip. Where it holds those of one phase only, its networks go before the second clip.
        then: Makes each that follows, from an image; None where one clip is enough.

    Raises:
        PromptError: `then` takes no image.
        ShapeError: The two make frames of another size, or at another rate.
    """

    first: Pipeline
    then: Pipeline | None

    def __post_init__(self) -> None:
        if self.then is None:
            return
        first, then = self.first.bundle, self.then.bundle
        if then.manifest.traits.task != "image-to-video":
            raise PromptError(
                f"{then.manifest.model} cannot go on from a frame: it is no image-to-video model",
                fix="name one that is with --image-model, or use --long windows",
            )
        sides = [(bundle.shape.height, bundle.shape.width, bundle.manifest.fps) for bundle in (first, then)]
        if sides[0] != sides[1]:
            texts = [f"{height}x{width} at {fps} frames a second" for height, width, fps in sides]
            raise ShapeError(
                f"{first.path} makes {texts[0]}, and {then.path} {texts[1]}: one cannot go on from the other",
                fix=f"run: {then.export_command((*then.shapes, first.shape))}",
            )

    def lengths(self, overlap: int = 1, *, continues: bool = False) -> Lengths:
        """Return how long the clips are, where a video that is there is continued, or a new one is begun."""
        first = self.first.bundle.shape.frames
        following = first if self.then is None else self.then.bundle.shape.frames
        return Lengths(0 if continues else first, following, overlap)

    def clips(
        self, prompt: str | Sequence[str], frames: int, *, seed: int = 0, overlap: int = 1, continues: bool = False
    ) -> tuple[Clip, ...]:
        """Return the clips of a video of `frames`; see `plan.clips_of`.

        Raises:
            PromptError: There are too few or too many prompts, or nothing that makes the clips after the first.
        """
        prompts = (prompt,) if isinstance(prompt, str) else tuple(prompt)
        starts = self.lengths(overlap, continues=continues).starts(frames)
        if self.then is None and (continues or len(starts) > 1):
            made = self.first.bundle
            raise PromptError(
                f"{frames} frames are more than the {made.shape.frames} of a clip, and nothing here goes on from one",
                fix=f"export an image-to-video model of {made.shape.height}x{made.shape.width} pixels",
            )
        return clips_of(frames, starts, prompts, seed)

    def stream(
        self,
        prompt: str | Sequence[str],
        *,
        num_frames: int,
        seed: int = 0,
        overlap: int = 1,
        hold_colours: bool = True,
        continued: Pixels | None = None,
        kept: Sequence[Pixels] = (),
        **wanted: Any,
    ) -> Generator[Event | ClipMade, None, None]:
        """Yield each step (`video` is the clip's number), each clip as it is whole, and the frames of the video.

        One clip is that of `Pipeline.stream` to the bit. Frames of several are rounded to the 256 levels that files
        have, so that a chain that goes on from a file equals one that was not cut off.

        Args:
            prompt: One, or one a clip.
            num_frames: Of the video; the last clip is cut off there.
            seed: Of the first clip; each that follows has one more.
            overlap: How many frames a clip shares with the one before.
            hold_colours: Whether medians are held at those of the first clip; see `match`.
            continued: The last frames of a video that is continued, from the last one; they are not given again.
            kept: The first clips, as `ClipMade` had them, which are not made again.
            wanted: As `Pipeline.stream` takes it; ``image``, ``video`` and ``strength`` are of the first clip.

        Raises:
            CvxError: As `Pipeline.stream` does.
        """
        continues = continued is not None
        clips = self.clips(prompt, num_frames, seed=seed, overlap=overlap, continues=continues)
        _check(wanted, continued, overlap)
        if len(clips) == 1 and not continues and not kept:
            yield from _cut(self._of_first(clips[0], wanted), num_frames)
            return
        ends = [*(clip.start for clip in clips[1:]), num_frames]
        tail = None if continued is None else continued[-overlap:]
        levels = None if continued is None or not hold_colours else levels_of(continued)
        for clip, end in zip(clips, ends, strict=True):
            if clip.index < len(kept):
                pixels = kept[clip.index]
            else:
                pixels = yield from self._made(clip, wanted, tail, levels)
                yield ClipMade(clip, pixels)
            if hold_colours and levels is None:
                levels = levels_of(pixels)
            shown = pixels if tail is None else _joined(tail, pixels)
            last = end == num_frames
            held = 0 if last else overlap - 1
            begin = 0 if tail is None else clip.start - (overlap - 1)
            tail = (shown if tail is None else np.concatenate([tail[:1], shown]))[-overlap:]
            yield from _given(shown[: num_frames - begin] if last else shown[: len(shown) - held], begin)

    def _made(
        self, clip: Clip, wanted: dict[str, Any], tail: Pixels | None, levels: Levels | None
    ) -> Generator[Event, None, Pixels]:
        """Make a clip, and return its frames in the colours of what it goes on from."""
        if tail is None:
            happening = self._of_first(clip, wanted)
        else:
            assert self.then is not None
            if self.first is not self.then and self.first.residency == "phase":
                self.first.unload()
            words = {key: value for key, value in wanted.items() if key not in OF_THE_FIRST}
            happening = self.then.stream(clip.prompt, seed=clip.seed, image=tail[0], **words)
        pieces: list[Pixels] = []
        with closing(happening):
            for event in happening:
                if isinstance(event, Frames):
                    pieces.append(as_bytes(event.frames))
                elif isinstance(event, Step):
                    yield _of_clip(event, clip)
        made = np.concatenate(pieces)
        return made if tail is None else matched(made, tail, levels)

    def _of_first(self, clip: Clip, wanted: dict[str, Any]) -> Generator[Event, None, None]:
        return self.first.stream(clip.prompt, seed=clip.seed, **wanted)


def _check(wanted: dict[str, Any], continued: Pixels | None, overlap: int) -> None:
    """Refuse what means nothing to a chain."""
    for name in OF_ONE_VIDEO:
        if name in wanted:
            raise CvxError(f"{name} is of one clip, and a long video has several", fix=f"leave {name} out")
    if continued is not None:
        for name in OF_THE_FIRST:
            if wanted.get(name) is not None:
                raise CvxError(f"{name} beside a video that is continued means nothing", fix=f"leave {name} out")
        if overlap > 1:
            raise ShapeError(f"a video that is continued shares 1 frame, not {overlap}", fix="use --overlap 1")


def _of_clip(step: Step, clip: Clip) -> Step:
    return Step(clip.index, step.index, step.count, step.timestep, step.latents, step.forecast)


def _cut(happening: Generator[Event, None, None], frames: int) -> Generator[Event, None, None]:
    """Yield what happens, without the frames beyond a number."""
    with closing(happening):
        for event in happening:
            if not isinstance(event, Frames):
                yield event
            elif event.start < frames:
                yield Frames(0, event.start, event.frames[: frames - event.start])


def _joined(tail: Pixels, pixels: Pixels) -> Pixels:
    """Return what follows the first frame of `tail`: both clips blended where both have frames, then the later one."""
    shared = len(tail)
    weights = (np.arange(1, shared, dtype=np.float32) / shared)[:, None, None, None]
    blended = tail[1:] + weights * (pixels[1:shared].astype(np.float32) - tail[1:])
    return np.concatenate([blended.round().astype(np.uint8), pixels[shared:]])


def _given(pixels: Pixels, start: int) -> Generator[Frames, None, None]:
    for first in range(0, len(pixels), _PIECE):
        yield Frames(0, start + first, pixels[first : first + _PIECE].astype(np.float32) / np.float32(255))
