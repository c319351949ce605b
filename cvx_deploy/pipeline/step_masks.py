"""The best masks for recorded trajectories: how well each step is foretold from any two before it, then which to run.

What is foretold are the clean latents. Where a sampler draws noise, the weights that foretell a step best from two
before it are found by least squares, for the prompt's branch and for the difference of the branches apart; where it
draws none, a straight line came nearer to the full run than they did. The mask of so many calls with the least error
then follows by dynamic programming over the last two steps that were run.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cvx_deploy.bundle.step_table import StepMask, Weights

Array = NDArray[np.float64]
_RIDGE = 1e-9
"""What pulls the weights towards repeating the last value, over its mean square, where two values are nearly one."""
_DECIMALS = 4


class Moments:
    """Mean products of the clean latents of every two steps, over the trajectories that were recorded.

    Each trajectory is divided by how uneven it is, so that a single restless one does not decide for all.

    Args:
        steps: T.
        guidance_scale: What the difference of the branches is multiplied by.

    Attributes:
        products: (2 T, 2 T): the prompt's branch at T steps, then the difference of the branches at each.
        scale: What that difference counts for: negative + g (prompt - negative) = prompt + (g - 1) (prompt - negative).
    """

    def __init__(self, steps: int, guidance_scale: float) -> None:
        self.products: Array = np.zeros((2 * steps, 2 * steps))
        self.scale = max(guidance_scale - 1, 0.0)

    def add(self, conditional: list[NDArray[np.float32]], difference: list[NDArray[np.float32]]) -> None:
        """Add a trajectory: the clean latents of each step, any shape; without guidance there is no difference."""
        rows = [values.ravel() for values in (*conditional, *difference)]
        found, kept = np.zeros_like(self.products), slice(len(rows))
        for start in range(0, rows[0].size, _PIECE):
            piece = np.stack([row[start : start + _PIECE] for row in rows]).astype(np.float64)
            found[kept, kept] += piece @ piece.T
        self.products += found / (self._unevenness(found) or 1.0)

    def _unevenness(self, products: Array) -> float:
        """Return the sum of squares of the second differences of what guidance makes of both branches."""
        steps = len(products) // 2
        guided = np.hstack([np.eye(steps), self.scale * np.eye(steps)])
        bends = np.diff(guided, 2, axis=0)
        return float(np.sum((bends @ products) * bends))


_PIECE = 1 << 16  # float32 values are multiplied as float64, so many at a time


@dataclass(frozen=True)
class Forecasts:
    """How each step is best foretold, and what it costs.

    Attributes:
        costs: (T, T, T): of running three steps with none in between: what their forecasts, from the first two, do to
            the finished latents, as a mean square; infinite where the steps are not in order.
        weights: (T, T, T, 4): with what the third is foretold from the first two; see `StepMask`.
    """

    costs: Array
    weights: Array


def forecasts_of(moments: Moments, influence: Array, *, straight: bool) -> Forecasts:
    """Fit every forecast. Errors between two runs add up as they are, signs and all; those of others do not.

    Args:
        moments: Of full trajectories.
        influence: (T,): how far the finished latents move with the clean latents of each step.
        straight: Whether every forecast goes on in a straight line, whatever least squares would say.
    """
    steps, products = len(moments.products) // 2, moments.products
    costs, weights = np.full((steps,) * 3, np.inf), np.zeros((steps, steps, steps, 4))
    for before in range(steps - 1):
        for last in range(before + 1, steps - 1):
            error = np.zeros(2 * steps)  # of what is foretold so far, as factors of the clean latents of all steps
            for step in range(last + 1, steps):
                costs[before, last, step] = max(error @ products @ error, 0.0)
                places = np.array([last, before, step])
                for offset, factor in ((0, influence[step]), (steps, moments.scale * influence[step])):
                    ahead = (step - last) / (last - before)
                    found = np.array([1 + ahead, -ahead]) if straight else _fitted(products, places + offset)
                    error[places + offset] += factor * np.append(found, -1)
                    weights[before, last, step, 2 * (offset > 0) :][:2] = found
    return Forecasts(costs, weights)


def _fitted(products: Array, places: NDArray[Any]) -> Array:
    """Return the weights of the first two places' values that come nearest to the third's."""
    last, before, step = places
    ridge = _RIDGE * products[last, last]
    a, b, d = products[last, last] + ridge, products[last, before], products[before, before] + ridge
    determinant = a * d - b * b
    if not determinant > 0:  # nothing to foretell: the branches are one
        return np.array([1.0, 0.0])
    p, q = products[last, step] + ridge, products[before, step]
    return np.array([(d * p - b * q) / determinant, (a * q - b * p) / determinant])


def best_masks(forecasts: Forecasts, calls: tuple[int, ...], first: int) -> tuple[StepMask, ...]:
    """Return the mask of each number of calls whose costs sum up to least, by dynamic programming.

    Args:
        forecasts: Of all steps.
        calls: How many steps are to be run, each above `first` and below T.
        first: How many are run at the start at the least, 2 or more.
    """
    steps, choices = len(forecasts.costs), []
    costs = np.full((steps, steps), np.inf)  # of having run these two steps last
    costs[first - 2, first - 1] = 0.0
    masks = {}
    for count in range(first + 1, max(calls) + 1):
        through = costs[:, :, None] + forecasts.costs
        choices.append(through.argmin(0))
        costs = through.min(0)
        if count in calls:
            run = _traced(int(costs[:, -1].argmin()), steps - 1, choices)
            masks[count] = _mask(forecasts.weights, (*range(first - 2), *run))
    return tuple(masks[count] for count in calls)


def _traced(before: int, last: int, choices: list[NDArray[np.intp]]) -> tuple[int, ...]:
    """Follow the choices back to the first step."""
    run = [last, before]
    for choice in reversed(choices):
        run.append(int(choice[run[-1], run[-2]]))
    return tuple(reversed(run))


def _mask(weights: Array, run: tuple[int, ...]) -> StepMask:
    found: list[Weights] = []
    for step in range(run[-1]):
        if step not in run:
            before, last = [place for place in run if place < step][-2:]
            first, second, third, fourth = (round(float(one), _DECIMALS) for one in weights[before, last, step])
            found.append((first, second, third, fourth))
    return StepMask(run, tuple(found))
