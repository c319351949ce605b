"""A script: what a long video shows from when on, a line each."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cvx_deploy.errors import PromptError
from cvx_deploy.reading import read_whole, reading

_FIX = "write lines such as: 4.5 a red circle moves to the left"
_LARGEST = 1 << 20  # bytes


@dataclass(frozen=True)
class Script:
    """Prompts and their times.

    Attributes:
        entries: Seconds, rising from 0, and what is shown from then on.
    """

    entries: tuple[tuple[float, str], ...]

    @classmethod
    def read(cls, path: Path) -> "Script":
        """Read a file of lines of a time in seconds and a prompt; empty ones, and those that begin with #, say nothing.

        Raises:
            PromptError: It cannot be read, or its times make no sense.
        """
        content = read_whole(path, PromptError, fix=_FIX, limit=_LARGEST)
        with reading(path, PromptError, fix=_FIX, says="is no script"):
            text = content.decode()
        lines = enumerate(text.splitlines(), 1)
        entries = [_entry(path, number, line) for number, line in lines if line.strip() and not line.startswith("#")]
        _check_times(path, [time for time, _ in entries])
        return cls(tuple(entries))

    def prompts(self, starts: Sequence[int], frames: int, fps: int) -> tuple[str, ...]:
        """Return the prompt of each clip: what is to be seen in the middle of what it brings.

        Args:
            starts: The first frame that each clip brings.
            frames: Of the whole video, at `fps` a second.

        Raises:
            PromptError: A prompt would be seen in no clip.
        """
        ends = [*starts[1:], frames]
        middles = [(start + end) / 2 / fps for start, end in zip(starts, ends, strict=True)]
        chosen = [sum(time <= middle for time, _ in self.entries) - 1 for middle in middles]
        for index, (time, prompt) in enumerate(self.entries):
            if index not in chosen:
                begins = ", ".join(f"{start / fps:.4g}" for start in starts)
                raise PromptError(
                    f"the prompt at {time:g} s ({prompt!r}) comes in no clip",
                    fix=f"the clips begin at {begins} s: give one prompt or none to each, or make the video longer",
                )
        return tuple(self.entries[index][1] for index in chosen)


def _entry(path: Path, number: int, line: str) -> tuple[float, str]:
    time, _, prompt = line.strip().partition(" ")
    try:
        seconds = float(time.removesuffix("s"))
    except ValueError:
        seconds = math.nan
    if not math.isfinite(seconds) or not prompt.strip():
        raise PromptError(f"{path}, line {number}, is no time and prompt", fix=_FIX)
    return seconds, prompt.strip()


def _check_times(path: Path, times: list[float]) -> None:
    if not times or times[0] != 0:
        begins = f"begins at {times[0]:g} s" if times else "says nothing"
        raise PromptError(f"{path} {begins}", fix="let its first line begin with 0")
    for earlier, later in itertools.pairwise(times):
        if later <= earlier:
            raise PromptError(f"{path}: {later:g} s comes after {earlier:g} s", fix="let the times rise")
