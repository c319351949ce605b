"""When each thing of a run happened, and what that says: seconds by stage, by step, to the first frame."""

import time
from dataclasses import dataclass

from cvx_deploy.engines.observe import Observer
from cvx_deploy.pipeline.events import Event, Step
from cvx_deploy.pipeline.report import Span

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


class RunClock(Observer):
    """Notes when each denoising step of a run was done, and how long its networks took to load.

    It is told of steps by being called with what happens; see `pipeline.events`.
    """

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.loads: list[Span] = []

    def __call__(self, event: Event) -> None:
        """Note a step."""
        if isinstance(event, Step):
            self.steps.append(time.monotonic())

    def loaded(self, role: str, start: float, end: float) -> None:
        """Keep the span."""
        self.loads.append(Span(LOAD, start, end))
