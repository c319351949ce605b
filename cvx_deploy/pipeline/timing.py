"""When each thing of a run happened, and what that says: seconds by stage, by step, to the first frame."""

import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from cvx_deploy.engines.backend import Backend, Session
from cvx_deploy.pipeline.report import Span
from cvx_deploy.progress import Advance, SilentProgress

LOAD = "load"
DECODE = "vae decode"


@dataclass(frozen=True)
class Trace:
    """One video, made: its spans, and when each denoising step was done, on the system's monotonic clock.

    Spans of `LOAD` lie within those of the stages that waited for them.
    """

    start: float
    end: float
    spans: tuple[Span, ...]
    steps: tuple[float, ...]

    @property
    def stages(self) -> dict[str, float]:
        """Seconds of each stage in order, without loading, which is a stage of its own."""
        seconds: dict[str, float] = {}
        loads = [span for span in self.spans if span.stage == LOAD]
        for span in sorted(self.spans, key=lambda span: (span.start, -span.end)):
            within = 0.0 if span.stage == LOAD else sum(load.seconds for load in loads if _inside(load, span))
            seconds[span.stage] = seconds.get(span.stage, 0.0) + span.seconds - within
        return seconds

    @property
    def step_seconds(self) -> list[float]:
        """From the end of each step to that of the next."""
        return [after - before for before, after in zip(self.steps, self.steps[1:], strict=False)]

    @property
    def first_frame(self) -> float:
        """Seconds from the start to the first decoded frames."""
        return min(span.end for span in self.spans if span.stage == DECODE) - self.start


def _inside(inner: Span, outer: Span) -> bool:
    return outer.start <= inner.start and inner.end <= outer.end


class StepClock(SilentProgress):
    """A `Progress` that shows nothing and notes when each denoising step was done."""

    def __init__(self) -> None:
        self.steps: list[float] = []

    @contextmanager
    def task(self, description: str, total: int | None = None) -> Iterator[Advance]:
        """Run the block."""
        yield self._note if description == "denoise" else lambda _: None

    def _note(self, amount: int) -> None:
        self.steps.append(time.monotonic())


class ClockedBackend:
    """A backend that notes how long its networks take to load."""

    def __init__(self, backend: Backend) -> None:
        self.bundle, self.to_device, self.to_host = backend.bundle, backend.to_device, backend.to_host
        self.loads: list[Span] = []
        self._backend = backend

    @contextmanager
    def load(self, role: str, sizes: Mapping[str, int]) -> Iterator[Session]:
        """Load a network; see `Backend.load`."""
        with ExitStack() as stack:
            start = time.monotonic()
            session = stack.enter_context(self._backend.load(role, sizes))
            self.loads.append(Span(LOAD, start, time.monotonic()))
            yield session
