"""What a run did, and when."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from cvx_deploy.pipeline.windows import Plan


@dataclass(frozen=True)
class Span:
    """A stretch of a run: its stage, and when it began and ended on the system's monotonic clock, in seconds."""

    stage: str
    start: float
    end: float

    @property
    def seconds(self) -> float:
        """How long it was."""
        return self.end - self.start


@dataclass(frozen=True)
class StepsTaken:
    """How a video's steps were taken, each counted from 0.

    Attributes:
        run: At these the transformer was run.
        conditional: At these its branch of the prompt alone was, and the negative prompt's was foretold.
        forecast: At these all was foretold.
        error: How far the last step that was run was from its forecast: L2 norm over that of what it said.
        calibrated: Whether the bundle's own table said which to run, and how to forecast the others.
    """

    run: tuple[int, ...]
    conditional: tuple[int, ...]
    forecast: tuple[int, ...]
    error: float | None
    calibrated: bool = False

    def __str__(self) -> str:
        half = f"{len(self.conditional)} by half, " if self.conditional else ""
        by = ", by the bundle's table" if self.calibrated else ""
        strayed = "" if self.error is None else f"; the last one run was {100 * self.error:.2g}% from its forecast"
        return f"{len(self.run)} steps run, {half}{len(self.forecast)} forecast{by}{strayed}"


@dataclass
class RunReport:
    """What a run did.

    Attributes:
        paths: The finished videos.
        seeds: One a video.
        spans: What it did when; a stage may come several times.
        cached_prompts: How many texts' embeddings came from the prompt cache.
        steps: By video, where steps could be forecast.
        fps: Frames a second of the files.
        interpolated: The numbers of each video's frames that no model made.
        windows: By which windows videos were made that are larger than the bundle's shape.
        branches_apart: Whether the two branches of guidance ran side by side on two devices.
    """

    paths: list[Path] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    cached_prompts: int = 0
    steps: dict[int, StepsTaken] = field(default_factory=dict)
    fps: int = 0
    interpolated: list[int] = field(default_factory=list)
    windows: Plan | None = None
    branches_apart: bool = False

    @property
    def stages(self) -> dict[str, float]:
        """Seconds of each stage, in order."""
        seconds: dict[str, float] = {}
        for span in self.spans:
            seconds[span.stage] = seconds.get(span.stage, 0.0) + span.seconds
        return seconds

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Keep the block as a span of a stage."""
        start = time.monotonic()
        try:
            yield
        finally:
            self.spans.append(Span(name, start, time.monotonic()))
