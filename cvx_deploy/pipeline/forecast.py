"""What the transformer would say at a step, foretold from what it said at steps before.

TaylorSeer (arXiv:2503.06923) continues a transformer's features; here it is the whole output, or the clean latents that
it stands for. What is kept are up to three latents a branch.
"""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from cvx_deploy.bundle.step_table import Weights
from cvx_deploy.pipeline.schedulers import Scheduler

Latents = NDArray[
    np.float32
]  # (B, F, C, H, W); of a transformer's output, B = 2 with guidance, the negative prompt first
Subject = Literal["x0", "output"]
Order = Literal[0, 1, 2]


@dataclass(frozen=True)
class Forecast:
    """How outputs are foretold.

    Attributes:
        subject: What is continued: the clean latents that outputs stand for, put together with a step's own latents
            again, or the outputs as they are.
        order: Degree of the polynomial through the last ``order + 1`` real values; 0 repeats the last one.
        weights: By step, what the last two real values are multiplied by instead, as `calibrate-cache` found it.
    """

    subject: Subject = "x0"
    order: Order = 1
    weights: Mapping[int, Weights] | None = None


class Forecaster:
    """Foretells one video's outputs. With guidance the two branches' difference is a series of its own.

    Args:
        forecast: How.
        scheduler: Says which clean latents an output stands for.
    """

    def __init__(self, forecast: Forecast, scheduler: Scheduler) -> None:
        self._subject, self._scheduler, self._weights = forecast.subject, scheduler, forecast.weights or {}
        self._conditional = _Series(forecast.order)
        self._difference = _Series(forecast.order)

    def add(self, index: int, output: Latents, latents: Latents) -> None:
        """Keep a real output, of one branch (1, F, C, H, W) or both (2, F, C, H, W), at a step's `latents`."""
        seen = self._seen(index, output, latents)
        self._conditional.add(index, seen[-1:])
        if len(seen) == 2:
            self._difference.add(index, seen[1:] - seen[:1])

    def output(self, index: int, latents: Latents) -> Latents:
        """Return what the transformer would say of `latents` at a step."""
        return self._said(index, self._foretold(index), latents)

    def completed(self, index: int, conditional: Latents, latents: Latents) -> Latents:
        """Return both branches (2, F, C, H, W) where only the one of the prompt was run."""
        negative = self._both(index, self._seen(index, conditional, latents))[:1]
        return np.concatenate([self._said(index, negative, latents), conditional])

    def error(self, index: int, output: Latents, latents: Latents) -> float | None:
        """Return how far a real output is from its forecast: L2 norm over the output's; None before the first."""
        if not self._conditional.known:
            return None
        foretold = self._foretold(index)
        seen = self._seen(index, output, latents)
        length = float(np.linalg.norm(seen))
        return float(np.linalg.norm(foretold[-len(seen) :] - seen)) / length if length else 0.0

    def _foretold(self, index: int) -> Latents:
        weights = self._weights_at(index)
        return self._both(index, self._conditional.at(index, weights[:2]))

    def _both(self, index: int, conditional: Latents) -> Latents:
        if not self._difference.known:
            return conditional
        difference = self._difference.at(index, self._weights_at(index)[2:])
        return np.concatenate([conditional - difference, conditional])

    def _weights_at(self, index: int) -> tuple[float, ...]:
        """Return a step's weights; those of the step before tell how far one that was run is from its forecast."""
        return self._weights.get(index, self._weights.get(index - 1, ()))

    def _seen(self, index: int, output: Latents, latents: Latents) -> Latents:
        return output if self._subject == "output" else self._scheduler.original(index, output, latents)

    def _said(self, index: int, seen: Latents, latents: Latents) -> Latents:
        return seen if self._subject == "output" else self._scheduler.output_of(index, seen, latents)


class _Series:
    """The last values of something, and the polynomial through them (Lagrange's form: gaps may be uneven)."""

    def __init__(self, order: int) -> None:
        self.known: deque[tuple[int, Latents]] = deque(maxlen=order + 1)

    def add(self, place: int, value: Latents) -> None:
        self.known.append((place, value))

    def at(self, place: int, weights: tuple[float, ...] = ()) -> Latents:
        """Return the value at a place; `weights` are of the last value and of the one before."""
        places = [known for known, _ in self.known]
        if not weights:
            weights = tuple(_lagrange(places, own, place) for own in reversed(places))
        values = (np.float32(weight) * value for weight, (_, value) in zip(weights, reversed(self.known), strict=True))
        total: Latents = reduce(np.add, values)
        return total


def _lagrange(places: list[int], own: int, place: int) -> float:
    """Return the weight of the value at `own` in the polynomial through all `places`, at `place`."""
    weight = 1.0
    for other in places:
        if other != own:
            weight *= (place - other) / (own - other)
    return weight
