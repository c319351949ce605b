"""One run of the miniature, stage by stage: `benchmarks/startup.py` starts this several times.

    python benchmarks/startup_stages.py STARTED OUTPUT

`STARTED` is what ``time.monotonic`` said when the process was started. Seconds go to stdout, as JSON.
"""

import time

BEGUN = time.monotonic()  # before all imports but this

import sys  # noqa: E402
from collections.abc import Iterator, Mapping  # noqa: E402
from contextlib import contextmanager  # noqa: E402
from typing import Any  # noqa: E402


class Clock:
    """Adds up seconds under names, in the order in which they first come."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Add the block's seconds."""
        start = time.monotonic()
        try:
            yield
        finally:
            self.add(name, time.monotonic() - start)

    def add(self, name: str, seconds: float) -> None:
        """Add some seconds."""
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds


def observer_of(clock: Clock) -> Any:
    """Return an observer of a backend that adds the seconds of loads and runs to a clock."""
    from cvx_deploy.engines.observe import Observer

    class Timed(Observer):
        def loaded(self, role: str, start: float, end: float) -> None:
            clock.add(f"load {role}", end - start)

        def before(self, role: str, inputs: Mapping[str, Any]) -> None:
            self.begun = time.monotonic()

        def after(self, role: str, outputs: Mapping[str, Any]) -> None:
            clock.add(f"run {role}", time.monotonic() - self.begun)

    return Timed()


def main() -> None:
    """Make the video, and print what each stage took."""
    clock = Clock()
    clock.seconds["interpreter"] = BEGUN - float(sys.argv[1])
    with clock.measure("imports"):
        import json
        from unittest import mock

        from cvx_deploy.bundle.opened import Bundle
        from cvx_deploy.engines.observe import ObservedBackend
        from cvx_deploy.engines.onnxruntime.backend import OrtBackend
        from cvx_deploy.miniatures import miniature
        from cvx_deploy.pipeline import prompts
        from cvx_deploy.pipeline.request import RunRequest
        from cvx_deploy.pipeline.run import run
        from cvx_deploy.pipeline.tokenizer import Tokenizer

    with clock.measure("open and check the bundle"):
        backend = OrtBackend(Bundle.open(miniature("mini")), residency="phase")

    def timed(*arguments: Any) -> Tokenizer:
        with clock.measure("tokenizer"):
            return Tokenizer(*arguments)

    with mock.patch.object(prompts, "Tokenizer", timed):
        request = RunRequest(("a red circle moves to the right",), sys.argv[2])
        report = run(ObservedBackend(backend, observer_of(clock)), request)
    clock.seconds["write video"] = report.stages["write video"]
    clock.seconds["the rest of the run"] = time.monotonic() - float(sys.argv[1]) - sum(clock.seconds.values())
    print(json.dumps(clock.seconds))


if __name__ == "__main__":
    main()
