"""Rounding to 4 bits: held against a plain NumPy one, and judged by what a layer puts out."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from cvx_deploy.exporters.quantization.rounding import least_error_step, rounded_by_moments, to_nearest

LIMITS, GROUP, STRETCH = (-8, 7), 8, 16
Values = NDArray[np.float64]


def layer(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return weights (12, 32), inputs (200, 32) whose channels go together in each half, and their moments."""
    random = np.random.default_rng(seed)
    halves = [random.standard_normal((200, 4)) @ random.standard_normal((4, STRETCH)) for _ in range(2)]
    together = np.hstack(halves) * np.exp(random.standard_normal(32)) + 0.1 * random.standard_normal((200, 32))
    inputs = torch.from_numpy(together.astype(np.float32))
    weight = torch.from_numpy(random.standard_normal((12, 32)).astype(np.float32))
    parts = inputs.reshape(200, -1, STRETCH).transpose(0, 1)
    return weight, inputs, parts.transpose(1, 2) @ parts / 200


def brain_surgeon(weight: Values, step: Values, moments: Values) -> Values:
    """Return one stretch rounded as optimal brain surgeon has it: the inverse anew after every weight."""
    damped = moments + 0.01 * np.diag(moments).mean() * np.eye(len(moments))
    left, rounded = weight.copy(), np.zeros_like(weight)
    todo = sorted(range(len(damped)), key=lambda channel: -moments[channel, channel])
    while todo:
        inverse, now = np.linalg.inv(damped[np.ix_(todo, todo)]), todo[0]
        rounded[:, now] = np.clip(np.round(left[:, now] / step[:, now]), *LIMITS)
        lost = left[:, now] - rounded[:, now] * step[:, now]
        left[:, todo] -= np.outer(lost, inverse[0] / inverse[0, 0])
        todo = todo[1:]
    return rounded


def by_numpy(weight: torch.Tensor, step: torch.Tensor, moments: torch.Tensor) -> Values:
    whole = step.repeat_interleave(GROUP, 1).double().numpy()
    stretches = [slice(index * STRETCH, (index + 1) * STRETCH) for index in range(len(moments))]
    parts = zip(stretches, moments.double().numpy(), strict=True)
    return np.hstack([brain_surgeon(weight.double().numpy()[:, place], whole[:, place], its) for place, its in parts])


@pytest.mark.parametrize("seed", range(3))
def test_rounding_by_moments_is_optimal_brain_surgeons(seed: int) -> None:
    weight, _, moments = layer(seed)
    step = least_error_step(weight, GROUP, LIMITS)
    found, expected = rounded_by_moments(weight, step, moments, LIMITS).numpy(), by_numpy(weight, step, moments)
    assert np.array_equal(found, expected)
    # The twin: moments that fit other channels round differently.
    assert not np.array_equal(rounded_by_moments(weight, step, moments.flip(0), LIMITS).numpy(), expected)


def error(weight: torch.Tensor, step: torch.Tensor, values: torch.Tensor, inputs: torch.Tensor) -> float:
    """Return the relative error of what the layer puts out."""
    expected = inputs @ weight.T
    return float((inputs @ (values * step.repeat_interleave(GROUP, 1)).T - expected).norm() / expected.norm())


def nearest(weight: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    return to_nearest(weight, step.repeat_interleave(GROUP, 1), LIMITS)


def test_outputs_are_nearer_with_moments_and_not_with_wrong_ones() -> None:
    weight, inputs, moments = layer()
    step = least_error_step(weight, GROUP, LIMITS)
    plain = error(weight, step, nearest(weight, step), inputs)
    assert error(weight, step, rounded_by_moments(weight, step, moments, LIMITS), inputs) < 0.5 * plain
    wrong = rounded_by_moments(weight, step, moments.flip(0), LIMITS)
    assert error(weight, step, wrong, inputs) > 0.9 * plain


def test_the_step_loses_least_of_those_tried() -> None:
    weight, _, _ = layer()
    step = least_error_step(weight, GROUP, LIMITS)

    def lost(tried: torch.Tensor) -> torch.Tensor:
        error = nearest(weight, tried) * tried.repeat_interleave(GROUP, 1) - weight
        return error.reshape(len(weight), -1, GROUP).square().sum(-1)

    unclipped = weight.reshape(len(weight), -1, GROUP).abs().amax(-1) / LIMITS[1]
    for part in range(17, 33):
        assert (lost(step) <= lost(unclipped * part / 32) * (1 + 1e-5)).all()
    assert lost(step).sum() < 0.85 * lost(unclipped).sum()


@pytest.mark.parametrize("make", [torch.zeros_like, lambda moments: moments[:, :1, :1].expand_as(moments)])
def test_inputs_that_are_silent_or_all_alike_leave_numbers(make: Callable[[torch.Tensor], torch.Tensor]) -> None:
    weight, _, moments = layer()
    weight[0] = 0
    step = least_error_step(weight, GROUP, LIMITS)
    values = rounded_by_moments(weight, step, make(moments).clone(), LIMITS)
    assert values.isfinite().all()
    assert (values >= LIMITS[0]).all()
    assert (values <= LIMITS[1]).all()
    assert not values[0].any()
