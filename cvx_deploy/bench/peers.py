"""The ways of making a video that a benchmark compares, each in a process of its own."""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Protocol, Self

from cvx_deploy.bundle.opened import Bundle
from cvx_deploy.engines.observe import ObservedBackend
from cvx_deploy.engines.registry import open_backend
from cvx_deploy.engines.spec import EngineName
from cvx_deploy.errors import CvxError
from cvx_deploy.exporters.reference.checkpoint import with_weights
from cvx_deploy.measure.baselines import Baseline
from cvx_deploy.pipeline.request import RunRequest, networks_needed
from cvx_deploy.pipeline.run import run as run_pipeline
from cvx_deploy.pipeline.timing import RunClock, Trace
from cvx_deploy.shape import Shape

Runner = Callable[[Path], Trace]
"""Makes the video at a path, and says when what was done."""


@dataclass(frozen=True)
class Work:
    """What every peer makes.

    Attributes:
        bundle: The bundle's folder, and `shape` which of its shapes.
        checkpoint: The folder of what the bundle was exported from; None where it is not to be had.
        request: The video; its output is each run's own.
    """

    bundle: Path
    shape: Shape
    checkpoint: Path | None
    request: RunRequest


class PeerKind(Protocol):
    """Something that makes the video; it travels to a process of its own."""

    @property
    def name(self) -> str:
        """What it is called in results."""

    def open(self, work: Work) -> AbstractContextManager[Runner]:
        """Make it ready; called in its own process."""


@dataclass(frozen=True)
class EnginePeer:
    """The bundle on one engine.

    Attributes:
        fast: Whether steps are forecast, as with ``run --fast``.
    """

    engine: EngineName
    fast: bool = False

    @property
    def name(self) -> str:
        """The engine's name, and how it is run."""
        return f"{self.engine}{' --fast' if self.fast else ''}"

    @contextmanager
    def open(self, work: Work) -> Iterator[Runner]:
        """Open the bundle; networks are loaded within each run, as `cvx-deploy run` does."""
        bundle = Bundle.open(work.bundle).at(work.shape)
        bundle = bundle if work.checkpoint is None else with_weights(bundle, work.checkpoint)
        needed = networks_needed(bundle, work.request)
        with open_backend(self.engine, bundle, needed=needed) as backend:

            def make(output: Path) -> Trace:
                clock, start = RunClock(), time.monotonic()
                observed = ObservedBackend(backend, clock)
                report = run_pipeline(observed, replace(work.request, output=output, fast=self.fast), watch=clock)
                return Trace(start, time.monotonic(), (*report.spans, *clock.loads), tuple(clock.steps))

            yield make


@dataclass(frozen=True)
class EagerPeer:
    """The checkpoint in diffusers, as it is or made faster by PyTorch's own means."""

    way: Baseline
    on_gpu: bool

    @property
    def name(self) -> str:
        """The way's name."""
        return self.way

    @contextmanager
    def open(self, work: Work) -> Iterator[Runner]:
        """Load the checkpoint, which stays in memory."""
        from cvx_deploy.exporters.reference.baseline import EagerPipeline

        assert work.checkpoint is not None
        bundle = Bundle.open(work.bundle).at(work.shape)
        pipeline = EagerPipeline(work.checkpoint, bundle, self.way, "cuda" if self.on_gpu else "cpu")
        yield lambda output: pipeline.make(replace(work.request, output=output))


class PeerProcess:
    """A peer in a process of its own, in this one's process group; it waits for one run after another."""

    def __init__(self, kind: PeerKind, work: Work) -> None:
        self.kind = kind
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, kind, work), daemon=True)
        self._process.start()
        theirs.close()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if error[0] is None and self._process.is_alive():
            self._connection.send(None)
            self._process.join(10)
        self._process.terminate()
        self._process.join()
        self._connection.close()

    def opened(self) -> float:
        """Wait until it is ready, and return the seconds that took."""
        seconds = self._answer()
        assert isinstance(seconds, float)
        return seconds

    def make(self, output: Path) -> Trace:
        """Make one video."""
        self._connection.send(output)
        trace = self._answer()
        assert isinstance(trace, Trace)
        return trace

    def _answer(self) -> float | Trace:
        try:
            answer: float | Trace | _Stated = self._connection.recv()
        except EOFError as error:
            self._process.join()
            raise CvxError(
                f"the process of {self.kind.name} ended with {self._process.exitcode}, and did not say why to this one",
                fix="see what it wrote above; -9 is most likely too little memory: leave peers out",
            ) from error
        if isinstance(answer, _Stated):
            raise CvxError(f"{self.kind.name}: {answer.what}", fix=answer.fix)
        return answer


@dataclass(frozen=True)
class _Stated:
    """A stated failure on its way to the other process."""

    what: str
    fix: str


def _serve(connection: Connection, kind: PeerKind, work: Work) -> None:
    """Open a peer, and run it as often as it is asked to; Ctrl-C is the other process's business."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.dup2(2, 1)  # stdout is for results alone
    start = time.monotonic()
    try:
        with kind.open(work) as make:
            connection.send(time.monotonic() - start)
            while (output := connection.recv()) is not None:
                connection.send(make(output))
    except CvxError as error:
        connection.send(_Stated(error.what, error.fix))
    except EOFError:
        return  # the other process has gone
