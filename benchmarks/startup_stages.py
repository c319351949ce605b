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
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - start


class TimedBackend:
    """A backend whose loads and runs are measured."""

    def __init__(self, backend: Any, clock: Clock) -> None:
        self.bundle, self.to_device, self.to_host = backend.bundle, backend.to_device, backend.to_host
        self._backend, self._clock = backend, clock

    @contextmanager
    def load(self, role: str, sizes: Mapping[str, int]) -> Iterator["TimedSession"]:
        """Load a network; see `Backend.load`."""
        opened = self._backend.load(role, sizes)
        with self._clock.measure(f"load {role}"):
            session = opened.__enter__()
        try:
            yield TimedSession(session, self._clock, f"run {role}")
        finally:
            opened.__exit__(None, None, None)


class TimedSession:
    """A session whose runs are measured."""

    def __init__(self, session: Any, clock: Clock, name: str) -> None:
        self._session, self._clock, self._name = session, clock, name

    def run(self, inputs: Mapping[str, Any]) -> Any:
        """Run the network once."""
        with self._clock.measure(self._name):
            return self._session.run(inputs)


def main() -> None:
    """Make the video, and print what each stage took."""
    clock = Clock()
    clock.seconds["interpreter"] = BEGUN - float(sys.argv[1])
    with clock.measure("imports"):
        import json
        from unittest import mock

        from cvx_deploy.bundle.opened import Bundle
        from cvx_deploy.engines.onnxruntime.backend import OrtBackend
        from cvx_deploy.miniatures import miniature
        from cvx_deploy.pipeline import prompts
        from cvx_deploy.pipeline.request import RunRequest
        from cvx_deploy.pipeline.run import run
        from cvx_deploy.pipeline.tokenizer import Tokenizer
    with clock.measure("open and check the bundle"):
        backend = OrtBackend(Bundle.open(miniature("mini")))

    def timed(*arguments: Any) -> Tokenizer:
        with clock.measure("tokenizer"):
            return Tokenizer(*arguments)

    with mock.patch.object(prompts, "Tokenizer", timed):
        request = RunRequest(("a red circle moves to the right",), sys.argv[2])
        report = run(TimedBackend(backend, clock), request)
    clock.seconds["write video"] = report.stages["write video"]
    clock.seconds["the rest of the run"] = time.monotonic() - float(sys.argv[1]) - sum(clock.seconds.values())
    print(json.dumps(clock.seconds))


if __name__ == "__main__":
    main()
