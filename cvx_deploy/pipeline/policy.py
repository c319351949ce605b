"""Which steps the transformer is run at, and which are forecast: one small object a video decides before each."""

import math
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from cvx_deploy.pipeline.forecast import Forecast
from cvx_deploy.pipeline.schedulers import Scheduler

Latents = NDArray[np.float32]
Action = Literal["run", "conditional", "forecast"]
"""Run the transformer; run its branch of the prompt alone, and foretell the negative prompt's; or foretell both."""


class StepPolicy(Protocol):
    """What decides for one video; it is asked and told of every step in turn, counted from 0.

    Its first answer must be ``run``: nothing is known before. Without guidance ``conditional`` is the same as ``run``.

    Attributes:
        forecast: How what is not run is foretold.
        splits: Whether it may answer ``conditional``, for which the transformer is loaded at a batch of one, too.
    """

    @property
    def forecast(self) -> Forecast:
        """See the class."""

    @property
    def splits(self) -> bool:
        """See the class."""

    def before(self, step: int, latents: Latents) -> Action:
        """Say what to do at a step, from the latents it starts from."""

    def after(self, step: int, latents: Latents, output: Latents) -> None:
        """Take note of what the transformer said where it was run, both branches with guidance."""


class FixedPolicy:
    """Runs the steps of a mask that is known before the first.

    Args:
        actions: One a step.
        forecast: How the others are foretold.
    """

    def __init__(self, actions: tuple[Action, ...], forecast: Forecast) -> None:
        self.actions, self.forecast = actions, forecast
        self.splits = "conditional" in actions

    def before(self, step: int, latents: Latents) -> Action:
        """Look into the mask."""
        return self.actions[step]

    def after(self, step: int, latents: Latents, output: Latents) -> None:
        """Nothing follows from it."""


class AdaptivePolicy:
    """Runs a step once forecasts would have strayed too far: EasyCache's rule (arXiv:2507.02860).

    The rate at which outputs changed with latents between the last two steps that were run, times the change of the
    latents since, is what an output is taken to have changed by; its share of the output, added up over the steps since
    the last one that was run, stays below the tolerance.

    Args:
        steps: How many there are.
        tolerance: The largest sum; 0 runs every step.
        first: How many steps are run at the start; the last one always is.
        forecast: How the others are foretold.
    """

    splits = False

    def __init__(self, steps: int, tolerance: float, first: int, forecast: Forecast) -> None:
        self.forecast = forecast
        self._last, self._tolerance, self._first = steps - 1, tolerance, first
        self._strayed, self._rate = 0.0, math.inf
        self._before: Latents | None = None  # the latents of the step before, run or not
        self._run: tuple[Latents, Latents] | None = None  # latents and output of the last step that was run

    def before(self, step: int, latents: Latents) -> Action:
        """Apply the rule."""
        if self._before is not None and self._run is not None:
            moved = _mean(latents - self._before)
            self._strayed += self._rate * moved / max(_mean(self._run[1]), _TINY)
        self._before = latents
        run = step < self._first or step == self._last or not self._strayed < self._tolerance
        return "run" if run else "forecast"

    def after(self, step: int, latents: Latents, output: Latents) -> None:
        """Measure the rate anew."""
        if self._run is not None:
            self._rate = _mean(output - self._run[1]) / max(_mean(latents - self._run[0]), _TINY)
        self._run, self._strayed = (latents, output), 0.0


class CleanLatentsPolicy:
    """Runs a step once the clean latents would have strayed too far: `AdaptivePolicy` for samplers that draw noise.

    There latents move by what is drawn, and EasyCache's rate says little. What an output is taken to have changed by is
    how fast the clean latents it stands for changed, a step, between the last two that were run.

    Args:
        scheduler: Says which clean latents an output stands for.
        tolerance: As that of `AdaptivePolicy`; `first` and `forecast` likewise.
    """

    splits = False

    def __init__(self, scheduler: Scheduler, tolerance: float, first: int, forecast: Forecast) -> None:
        self.forecast = forecast
        self._scheduler, self._tolerance, self._first = scheduler, tolerance, first
        self._last = len(scheduler.timesteps) - scheduler.start - 1
        self._strayed, self._rate = 0.0, math.inf
        self._run: tuple[int, Latents] | None = None  # the last step that was run, and its clean latents

    def before(self, step: int, latents: Latents) -> Action:
        """Apply the rule."""
        self._strayed += self._rate
        run = step < self._first or step == self._last or not self._strayed < self._tolerance
        return "run" if run else "forecast"

    def after(self, step: int, latents: Latents, output: Latents) -> None:
        """Measure the rate anew."""
        clean = self._scheduler.original(self._scheduler.start + step, output, latents)
        if self._run is not None:
            self._rate = _mean(clean - self._run[1]) / max(_mean(clean), _TINY) / (step - self._run[0])
        self._run, self._strayed = (step, clean), 0.0


_TINY = 1e-30


def _mean(values: Latents) -> float:
    return float(np.abs(values).mean(dtype=np.float64))


def spread(steps: int, calls: int, first: int) -> tuple[Action, ...]:
    """Return a mask of so many calls: the first ones and the last of all, between them with gaps that grow.

    What a video shows is decided in the early steps, where an error is carried into all that follow.

    Args:
        steps: How many there are.
        calls: How many of them are run, more than `first`.
        first: How many are run at the start at the least, 1 or more.
    """
    last = first - 1
    run = set(range(first))
    for part in range(1, calls - first + 1):
        place = first - 1 + (steps - first) * (part / (calls - first)) ** _GROWTH
        last = max(round(place), last + 1)
        run.add(last)
    return tuple("run" if step in run else "forecast" for step in range(steps))


_GROWTH = 1.5
"""The power by which calls are spread over the steps; 1 would be evenly."""
