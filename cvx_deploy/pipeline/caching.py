"""From what a run asks for to the policy of each of its videos: what is forecast, how, and how much."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, get_args

from cvx_deploy.bounds import MOST_SPEEDUP, MOST_TOLERANCE
from cvx_deploy.errors import CvxError
from cvx_deploy.pipeline.forecast import Forecast
from cvx_deploy.pipeline.policy import AdaptivePolicy, CleanLatentsPolicy, FixedPolicy, StepPolicy, spread
from cvx_deploy.pipeline.schedulers import Scheduler

if TYPE_CHECKING:
    from cvx_deploy.pipeline.request import RunRequest

CacheMode = Literal["fixed", "adaptive"]
PolicyMaker = Callable[[int], StepPolicy]
"""Makes the policy of one video of so many steps."""

SPEEDUP = 2.0
"""How many times less work a fixed mask makes unless told otherwise; what ``--fast`` means."""
TOLERANCE = 0.1
"""How far forecasts may stray unless told otherwise."""
TOLERANCE_OF_NOISY = 0.05
"""The same where each step draws noise, and the rule is another one."""
_MOST_GUIDED_TREND = 4.0
"""The largest guidance scale at which a trend helps where noise is drawn: at 2 it did, at 6 it did harm."""
_FIRST = 0.08
"""The share of the steps that is always run at the start: outputs change most there, and forecasts need some."""


def check_cache(request: "RunRequest") -> None:
    """Refuse dials that are out of range, and one of the other mode.

    Raises:
        CvxError: Of what is wrong.
    """
    speedup, tolerance, mode = request.cache_speedup, request.cache_tolerance, request.cache
    if isinstance(mode, str) and mode not in get_args(CacheMode):
        raise CvxError(f"cache {mode!r}", fix=f"use {' or '.join(get_args(CacheMode))}")
    if speedup is not None and not 1 <= speedup <= MOST_SPEEDUP:  # a NaN fails this too
        raise CvxError(f"a cache speedup of {speedup}", fix=f"use --cache-speedup between 1 and {MOST_SPEEDUP:g}")
    if tolerance is not None and not 0 <= tolerance <= MOST_TOLERANCE:
        raise CvxError(f"a cache tolerance of {tolerance}", fix=f"use --cache-tolerance from 0 to {MOST_TOLERANCE:g}")
    if speedup is not None and request.cache != "fixed":
        raise CvxError("--cache-speedup is the dial of --cache fixed", fix="add --cache fixed, or leave it out")
    if tolerance is not None and request.cache != "adaptive":
        raise CvxError("--cache-tolerance is the dial of --cache adaptive", fix="add --cache adaptive, or leave it out")


def policy_for(request: "RunRequest", scheduler: Scheduler) -> StepPolicy | None:
    """Return a new policy for one video, or None where every step is to be run.

    Raises:
        CvxError: The video has too few steps to forecast any, or to save so much.
    """
    steps = len(scheduler.timesteps) - scheduler.start
    mode = "fixed" if request.fast else request.cache
    if mode is None:
        return None
    if callable(mode):
        return mode(steps)
    first = max(2, round(_FIRST * steps))
    if steps < first + 2:
        raise CvxError(
            f"{steps} steps are too few to forecast any of them: {first} and the last are run",
            fix=f"use --steps {first + 2} or more, or leave the cache out",
        )
    forecast = forecast_for(scheduler, request.guidance_scale)
    if mode == "adaptive":
        return _adaptive(request.cache_tolerance, scheduler, first, forecast)
    if request.cache_speedup is None:  # as near to it as so few steps allow
        return FixedPolicy(spread(steps, max(round(steps / SPEEDUP), first + 1), first), forecast)
    calls = round(steps / request.cache_speedup)
    if calls <= first:
        raise CvxError(
            f"{steps} steps with a cache speedup of {request.cache_speedup} leave {calls} calls of the transformer, "
            f"and {first} steps and the last are always run",
            fix=f"use --cache-speedup {_floor(steps / (first + 1))} or less, or more --steps",
        )
    return FixedPolicy(spread(steps, calls, first), forecast)


def _adaptive(tolerance: float | None, scheduler: Scheduler, first: int, forecast: Forecast) -> StepPolicy:
    if scheduler.draws_noise:
        return CleanLatentsPolicy(scheduler, TOLERANCE_OF_NOISY if tolerance is None else tolerance, first, forecast)
    steps = len(scheduler.timesteps) - scheduler.start
    return AdaptivePolicy(steps, TOLERANCE if tolerance is None else tolerance, first, forecast)


def forecast_for(scheduler: Scheduler, guidance_scale: float) -> Forecast:
    """Return how a scheduler's steps are best foretold, as docs/step-cache.md measured it.

    Guidance multiplies the noise in a trend between two steps that have drawn some: the last value is kept then.
    """
    return Forecast("x0", 0 if scheduler.draws_noise and guidance_scale > _MOST_GUIDED_TREND else 1)


def _floor(value: float) -> float:
    return math.floor(100 * value) / 100
