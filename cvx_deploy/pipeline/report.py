"""What a run did, and when."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path


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


@dataclass
class RunReport:
    """What a run did.

    Attributes:
        paths: The finished videos.
        seeds: One a video.
        spans: What it did when; a stage may come several times.
        cached_prompts: How many texts' embeddings came from the prompt cache.
    """

    paths: list[Path] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    cached_prompts: int = 0

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
