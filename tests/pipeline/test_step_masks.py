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


def moments_of(seed: int) -> Moments:
    moments = Moments(STEPS)
    for conditional, difference in zip(*trajectories(seed), strict=True):
        moments.add(conditional, difference)
    return moments


def forecasts(seed: int, guidance_scale: float = 6.0) -> Forecasts:
    return forecasts_of(moments_of(seed), guidance_scale, np.linspace(1, 3, STEPS))


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


def test_a_gap_costs_what_its_forecasts_get_wrong_together() -> None:
    """Of running 1, 3 and then 6: the errors at 4 and 5, times their influence, summed up, and squared."""
    found, (conditional, difference) = forecasts(3), trajectories(3)
    influence, squares = np.linspace(1, 3, STEPS), []
    for ours, theirs in zip(conditional, difference, strict=True):
        error = np.zeros(VALUES)
        for step in (4, 5):
            weights = found.weights[1, 3, step]
            prompt = weights[0] * ours[3] + weights[1] * ours[1] - ours[step]
            apart = weights[2] * theirs[3] + weights[3] * theirs[1] - theirs[step]
            error += influence[step] * (prompt + 5 * apart)
        squares.append(np.mean(error**2))
    assert found.costs[1, 3, 6] == pytest.approx(np.mean(squares), rel=FORECAST_ROUNDING)
    assert np.isinf(found.costs[3, 1, 6])


def test_the_weights_are_those_of_least_squares() -> None:
    conditional, _ = trajectories(0)
    known = np.stack([np.concatenate([one[step] for one in conditional]) for step in (4, 2)], axis=1)
    wanted = np.concatenate([one[5] for one in conditional])
    expected = np.linalg.lstsq(known.astype(np.float64), wanted, rcond=None)[0]
    assert np.allclose(forecasts(0).weights[2, 4, 5, :2], expected, atol=FORECAST_ROUNDING)


def test_without_guidance_there_is_no_difference_to_foretell() -> None:
    moments = Moments(STEPS)
    for conditional, _ in zip(*trajectories(0), strict=True):
        moments.add(conditional, [])
    found = forecasts_of(moments, 1.0, np.ones(STEPS))
    assert np.array_equal(found.weights[2, 4, 5, 2:], [1.0, 0.0])
    assert best_masks(found, (5,), 2)[0].run[-1] == STEPS - 1
