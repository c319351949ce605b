"""What the transformer would say, foretold from what it said."""

from typing import Any

import numpy as np
import pytest

from cvx_deploy.pipeline.forecast import Forecast, Forecaster, Order, Subject
from cvx_deploy.pipeline.schedulers import Scheduler, SchedulerConfig, make_scheduler
from tests.tolerances import FORECAST_ROUNDING

SHAPE = (1, 3, 4, 5, 6)  # (B, F, C, H, W)
STEPS = 20


def scheduler(prediction_type: Any = "v_prediction") -> Scheduler:
    """Return one whose first step is not at pure noise."""
    config = SchedulerConfig(prediction_type=prediction_type, timestep_spacing="trailing")
    return make_scheduler("ddim", config, STEPS)


def polynomial(degree: int, seed: int = 0) -> Any:
    """Return values that go along a polynomial over the steps."""
    factors = np.random.default_rng(seed).standard_normal((degree + 1, *SHAPE)).astype(np.float32)
    return lambda place: sum(factor * np.float32((place / STEPS) ** power) for power, factor in enumerate(factors))


def random(seed: int, batch: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((batch, *SHAPE[1:])).astype(np.float32)


def error_of(forecast: Forecast, said: Any, places: tuple[int, ...], place: int) -> float:
    """Return how far a forecast at `place` is from what is said there, after real values at `places`."""
    schedule = scheduler()
    forecaster = Forecaster(forecast, schedule)
    for known in places:
        latents = random(known)
        output = said(known) if forecast.subject == "output" else schedule.output_of(known, said(known), latents)
        forecaster.add(known, output, latents)
    latents = random(place)
    found = forecaster.output(place, latents)
    seen = found if forecast.subject == "output" else schedule.original(place, found, latents)
    return float(np.abs(seen - said(place)).max())


@pytest.mark.parametrize("subject", ["x0", "output"])
@pytest.mark.parametrize("order", [0, 1, 2])
def test_a_forecast_of_an_order_goes_along_a_polynomial_of_that_degree_over_uneven_gaps(
    order: Order, subject: Subject
) -> None:
    assert error_of(Forecast(subject, order), polynomial(order), (1, 2, 5, 9), 12) < FORECAST_ROUNDING


@pytest.mark.parametrize("order", [0, 1, 2])
def test_twin_a_forecast_does_not_go_along_a_polynomial_of_a_higher_degree(order: Order) -> None:
    assert error_of(Forecast("x0", order), polynomial(order + 1), (1, 2, 5, 9), 12) > 100 * FORECAST_ROUNDING


def test_with_fewer_real_values_than_its_order_takes_a_forecast_is_of_a_lower_order() -> None:
    assert error_of(Forecast("x0", 2), polynomial(1), (3, 7), 8) < FORECAST_ROUNDING
    assert error_of(Forecast("x0", 1), polynomial(0), (3,), 8) < FORECAST_ROUNDING


@pytest.mark.parametrize("prediction_type", ["v_prediction", "epsilon", "sample"])
def test_an_output_put_together_from_its_clean_latents_is_that_output(prediction_type: str) -> None:
    schedule, output, latents = scheduler(prediction_type), random(1), random(2)
    for index in range(STEPS):
        original = schedule.original(index, output, latents)
        again = schedule.original(index, schedule.output_of(index, original, latents), latents)
        assert np.abs(again - original).max() <= FORECAST_ROUNDING * max(1, np.abs(original).max())


@pytest.mark.parametrize("subject", ["x0", "output"])
def test_where_one_branch_is_run_it_stays_as_it_is_and_the_difference_of_the_other_is_continued(
    subject: Subject,
) -> None:
    schedule, positive, difference = scheduler(), polynomial(3, seed=1), polynomial(1, seed=2)
    forecaster = Forecaster(Forecast(subject, 1), schedule)

    def output_at(place: int, latents: np.ndarray) -> np.ndarray:
        both = np.concatenate([positive(place) - difference(place), positive(place)])
        return both if subject == "output" else schedule.output_of(place, both, latents)

    for place in (2, 5):
        forecaster.add(place, output_at(place, random(place)), random(place))
    latents = random(9)
    expected = output_at(9, latents)
    found = forecaster.completed(9, expected[1:], latents)
    assert np.array_equal(found[1:], expected[1:])
    assert np.abs(found - expected).max() < 10 * FORECAST_ROUNDING
    error = forecaster.error(9, expected[1:], latents)
    assert error is not None
    assert error > 100 * FORECAST_ROUNDING  # the branch that is run is not linear itself


def test_the_error_of_a_forecast_is_relative_to_what_was_said() -> None:
    forecaster, said = Forecaster(Forecast("output", 0), scheduler()), random(1)
    assert forecaster.error(3, said, random(2)) is None
    forecaster.add(3, said, random(2))
    assert forecaster.error(4, said, random(2)) == 0
    assert forecaster.error(4, 2 * said, random(2)) == pytest.approx(0.5)
