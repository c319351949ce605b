"""Guidance over two devices: each runs one of a step's two branches, at a batch of one, and the host joins them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from cvx_deploy.bundle.opened import Bundle
from cvx_deploy.engines.backend import Backend, DeviceTensor, Session
from cvx_deploy.pipeline.report import RunReport
from cvx_deploy.pipeline.request import RunRequest

Here = TypeVar("Here")
There = TypeVar("There")
_ALONE = {"batch": 1}


@contextmanager
def denoisers(devices: Sequence[Backend], request: RunRequest, report: RunReport) -> Iterator[Sequence[Backend]]:
    """Give what the videos are shared out among: the devices, or the first two as one for one video with guidance."""
    report.branches_apart = request.parts_branches(len(devices))
    if not report.branches_apart:
        yield devices
        return
    with Branches(devices[0], devices[1]) as both:
        yield (both,)


@dataclass(frozen=True)
class _Halves:
    """A tensor of both branches: what is the same at every step, on each device the part that is its own."""

    negative: DeviceTensor
    positive: DeviceTensor


class Branches:
    """Two backends of one bundle as one, whose batch of two runs on both of them at once; see `Backend`.

    The calling thread works with the first, which has the branch of the negative prompt; a thread of its own works with
    the second. When either fails, the other one ends what it is at, and is asked for nothing more.

    Args:
        negative: Runs the branch of the negative prompt.
        positive: Runs the branch of the prompt, alone where a step policy asks for it alone.
    """

    def __init__(self, negative: Backend, positive: Backend) -> None:
        self._negative, self._positive = negative, positive
        self._thread = ThreadPoolExecutor(1, "branch")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown()

    @property
    def bundle(self) -> Bundle:
        """What both run."""
        return self._negative.bundle

    @contextmanager
    def load(self, role: str, sizes: Mapping[str, int]) -> Iterator[Session]:
        """Give a network of both devices for the block, or at a batch of one that of the second; see `Backend.load`."""
        with ExitStack() as here, ExitStack() as there:
            load_there = self._positive.load(role, {**sizes, **_ALONE})
            if sizes["batch"] == 1:
                yield there.enter_context(load_there)
                return
            load_here = self._negative.load(role, {**sizes, **_ALONE})
            sessions = self.at_once(
                lambda: here.enter_context(load_here),
                lambda: there.enter_context(load_there),
            )
            batched = {spec.name for spec in self.bundle.network(role).inputs if spec.shape[0] == "batch"}
            yield _Joined(self, (self._negative, self._positive), sessions, batched)

    def to_device(self, array: NDArray[Any]) -> DeviceTensor:
        """Bring each branch's part of a tensor to its device; see `Backend.to_device`."""
        if len(array) == 1:
            return self._positive.to_device(array)
        return _Halves(self._negative.to_device(array[:1]), self._positive.to_device(array[1:]))

    def to_host(self, tensor: DeviceTensor) -> NDArray[Any]:
        """Return a tensor's values; those of both branches lie on the host already."""
        return tensor if isinstance(tensor, np.ndarray) else self._positive.to_host(tensor)

    def at_once(self, here: Callable[[], Here], there: Callable[[], There]) -> tuple[Here, There]:
        """Do one thing in this thread and one in the second's; both have ended when this returns or raises."""
        coming = self._thread.submit(there)
        try:
            done = here()
        finally:
            wait([coming])
        return done, coming.result()


@dataclass(frozen=True)
class _Joined:
    """A network on both devices.

    Attributes:
        backends: That of the negative prompt's branch first; `sessions` likewise.
        batched: The inputs of which each branch takes its part.
    """

    branches: Branches
    backends: tuple[Backend, Backend]
    sessions: tuple[Session, Session]
    batched: set[str]

    def run(self, inputs: Mapping[str, "NDArray[Any] | DeviceTensor"]) -> dict[str, DeviceTensor]:
        """Run both branches, and return their outputs joined on the host."""
        negative, positive = self.branches.at_once(lambda: self._run(0, inputs), lambda: self._run(1, inputs))
        return {name: np.concatenate([output, positive[name]]) for name, output in negative.items()}

    def _run(self, branch: int, inputs: Mapping[str, "NDArray[Any] | DeviceTensor"]) -> dict[str, NDArray[Any]]:
        taken = {name: self._part(name, value, branch) for name, value in inputs.items()}
        outputs = self.sessions[branch].run(taken)
        return {name: self.backends[branch].to_host(output) for name, output in outputs.items()}

    def _part(self, name: str, value: "NDArray[Any] | DeviceTensor", branch: int) -> "NDArray[Any] | DeviceTensor":
        if isinstance(value, _Halves):
            return value.positive if branch else value.negative
        return value[branch : branch + 1] if name in self.batched else value
