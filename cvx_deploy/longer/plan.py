"""How many clips a long video takes, and which part of it each of them brings."""

from collections.abc import Sequence
from dataclasses import dataclass

from cvx_deploy.bounds import MOST_FRAMES
from cvx_deploy.errors import PromptError, ShapeError


@dataclass(frozen=True)
class Clip:
    """One run of a model within a long video.

    Attributes:
        index: From 0.
        start: The number of the first frame of the video that it brings.
        frames: How many it brings; those that it shares with the clip before are that one's.
        prompt: What it shows.
        seed: With it, and what it starts from, the clip is made again.
    """

    index: int
    start: int
    frames: int
    prompt: str
    seed: int


@dataclass(frozen=True)
class Lengths:
    """How long the clips are, in frames.

    Attributes:
        first: Of the first clip; 0 where a video that is there is continued.
        then: Of each that follows.
        overlap: Of what a clip shares with the one before: it starts from the first of these.

    Raises:
        ShapeError: The clips cannot overlap so.
    """

    first: int
    then: int
    overlap: int = 1

    def __post_init__(self) -> None:
        most = min(self.then - 1, self.first or self.then)
        if not 1 <= self.overlap <= most:
            raise ShapeError(
                f"clips of {self.first or self.then} and {self.then} frames cannot share {self.overlap} of them",
                fix=f"use --overlap 1, or another from 1 to {most}",
            )

    def starts(self, frames: int) -> list[int]:
        """Return the number of the frame at which each clip of a video of `frames` begins to bring something.

        Raises:
            ShapeError: There is no such video.
        """
        if not 0 < frames <= MOST_FRAMES:
            raise ShapeError(f"a video of {frames} frames", fix=f"ask for 1 to {MOST_FRAMES} frames")
        return [*([0] if self.first else []), *range(self.first, frames, self.then - self.overlap)]


def clips_of(frames: int, starts: Sequence[int], prompts: Sequence[str], seed: int) -> tuple[Clip, ...]:
    """Return the clips of a video: clip k has seed ``seed + k`` and prompt k, or the one that there is.

    Raises:
        PromptError: There is neither one prompt nor one a clip.
    """
    if len(prompts) not in (1, len(starts)):
        raise PromptError(
            f"{len(prompts)} prompts for {len(starts)} clips",
            fix=f"give one, or {len(starts)}, or say with --script FILE which comes when",
        )
    ends = [*starts[1:], frames]
    each = list(prompts) * (len(starts) if len(prompts) == 1 else 1)
    return tuple(
        Clip(index, start, end - start, prompt, seed + index)
        for index, (start, end, prompt) in enumerate(zip(starts, ends, each, strict=True))
    )
