"""The masks of recorded trajectories are the best ones there are, and foretell by least squares."""

import itertools

import numpy as np
import pytest

from cvx_deploy.pipeline.step_masks import Forecasts, Moments, best_masks, forecasts_of
from tests.tolerances import FORECAST_ROUNDING

STEPS, VALUES = 8, 300


def trajectories(seed: int, count: int = 2) -> tuple[list[list[np.ndarray]], list[list[np.ndarray]]]:
    """Return smooth random curves with some noise: the prompt's branch and the difference, by trajectory and step."""
    rng = np.random.default_rng(seed)
    times = np.linspace(0, 1, STEPS)

    def curve() -> list[np.ndarray]:
        factors = rng.standard_normal((4, VALUES))
        smooth = [sum(factor * time**power for power, factor in enumerate(factors)) for time in times]
        return [(values + 0.1 * rng.standard_normal(VALUES)).astype(np.float32) for values in smooth]

    return [curve() for _ in range(count)], [curve() for _ in range(count)]


def moments_of(seed: int, guidance_scale: float = 6.0, count: int = 2) -> Moments:
    moments = Moments(STEPS, guidance_scale)
    for conditional, difference in zip(*trajectories(seed, count), strict=True):
        moments.add(conditional, difference)
    return moments


def forecasts(seed: int, count: int = 2, *, straight: bool = False) -> Forecasts:
    return forecasts_of(moments_of(seed, count=count), np.linspace(1, 3, STEPS), straight=straight)


def cost(found: Forecasts, run: tuple[int, ...]) -> float:
    return float(sum(found.costs[three] for three in zip(run, run[1:], run[2:], strict=False)))


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("first", [2, 3])
def test_no_other_mask_of_so_many_calls_costs_less(seed: int, first: int) -> None:
    found = forecasts(seed)
    for calls, mask in zip((4, 6), best_masks(found, (4, 6), first), strict=True):
        between = itertools.combinations(range(first, STEPS - 1), calls - first - 1)
        every = [(*range(first), *middle, STEPS - 1) for middle in between]
        assert mask.run == min(every, key=lambda run: cost(found, run))
        assert len(mask.weights) == STEPS - calls


@pytest.mark.parametrize("straight", [False, True])
def test_a_gap_costs_what_its_forecasts_get_wrong_together(straight: bool) -> None:
    """The errors of all steps in between, times their influence, summed up, and squared."""
    found, (conditional, difference) = forecasts(3, count=1, straight=straight), trajectories(3, 1)
    influence = np.linspace(1, 3, STEPS)

    def square(before: int, last: int, following: int) -> float:
        error = np.zeros(VALUES)
        for step in range(last + 1, following):
            weights = found.weights[before, last, step]
            for factor, ((ours,), first) in zip((1, 5), ((conditional, 0), (difference, 2)), strict=True):
                foretold = weights[first] * ours[last] + weights[first + 1] * ours[before]
                error += influence[step] * factor * (foretold - ours[step])
        return float(np.sum(error**2))

    ratio = found.costs[1, 3, 6] / found.costs[2, 4, 7]
    assert ratio == pytest.approx(square(1, 3, 6) / square(2, 4, 7), rel=FORECAST_ROUNDING)
    assert np.isinf(found.costs[3, 1, 6])


def test_the_weights_are_those_of_least_squares_or_of_a_straight_line() -> None:
    conditional, _ = trajectories(0, 1)
    known = np.stack([conditional[0][step] for step in (4, 2)], axis=1)
    expected = np.linalg.lstsq(known.astype(np.float64), conditional[0][5], rcond=None)[0]
    assert np.allclose(forecasts(0, count=1).weights[2, 4, 5, :2], expected, atol=FORECAST_ROUNDING)
    assert np.allclose(forecasts(0, straight=True).weights[2, 4, 5], [1.5, -0.5, 1.5, -0.5])


def test_a_restless_trajectory_counts_no_more_than_a_calm_one() -> None:
    conditional, difference = trajectories(0, 1)
    calm, restless = Moments(STEPS, 6.0), Moments(STEPS, 6.0)
    calm.add(conditional[0], difference[0])
    restless.add([10 * values for values in conditional[0]], [10 * values for values in difference[0]])
    assert np.allclose(calm.products, restless.products, rtol=FORECAST_ROUNDING)


def test_without_guidance_there_is_no_difference_to_foretell() -> None:
    moments = Moments(STEPS, 1.0)
    for conditional, _ in zip(*trajectories(0), strict=True):
        moments.add(conditional, [])
    found = forecasts_of(moments, np.ones(STEPS), straight=False)
    assert np.array_equal(found.weights[2, 4, 5, 2:], [1.0, 0.0])
    assert best_masks(found, (5,), 2)[0].run[-1] == STEPS - 1
