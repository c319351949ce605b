"""From what a run asks for to the policy of each of its videos: what is forecast, how, and how much."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, get_args

from cvx_deploy.bounds import MOST_SPEEDUP, MOST_TOLERANCE
from cvx_deploy.bundle.opened import Bundle
from cvx_deploy.bundle.step_table import StepTable, digest_of
from cvx_deploy.errors import CalibrationError, CvxError
from cvx_deploy.pipeline.forecast import Forecast
from cvx_deploy.pipeline.policy import Action, AdaptivePolicy, CleanLatentsPolicy, FixedPolicy, StepPolicy, spread
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
    if speedup is not None:
        check_speedup(speedup, "--cache-speedup")
    if tolerance is not None and not 0 <= tolerance <= MOST_TOLERANCE:
        raise CvxError(f"a cache tolerance of {tolerance}", fix=f"use --cache-tolerance from 0 to {MOST_TOLERANCE:g}")
    if speedup is not None and request.cache != "fixed":
        raise CvxError("--cache-speedup is the dial of --cache fixed", fix="add --cache fixed, or leave it out")
    if tolerance is not None and request.cache != "adaptive":
        raise CvxError("--cache-tolerance is the dial of --cache adaptive", fix="add --cache adaptive, or leave it out")


def check_speedup(speedup: float, option: str) -> None:
    """Refuse one that is out of range."""
    if not 1 <= speedup <= MOST_SPEEDUP:  # a NaN fails this too
        raise CvxError(f"a cache speedup of {speedup}", fix=f"use {option} between 1 and {MOST_SPEEDUP:g}")


def first_steps(steps: int) -> int:
    """Return how many steps are always run at the start."""
    return max(2, round(_FIRST * steps))


def calls_for(steps: int, speedup: float | None) -> int:
    """Return how often the transformer is run; without a speedup as near to the default as so few steps allow."""
    return max(round(steps / SPEEDUP), first_steps(steps) + 1) if speedup is None else round(steps / speedup)


def policy_for(request: "RunRequest", scheduler: Scheduler, bundle: Bundle) -> StepPolicy | None:
    """Return a new policy for one video, or None where every step is to be run.

    Raises:
        CvxError: The video has too few steps to forecast any, or to save so much.
        CalibrationError: The bundle's table of steps is not for such a run.
    """
    steps = len(scheduler.timesteps) - scheduler.start
    mode = "fixed" if request.fast else request.cache
    if mode is None:
        return None
    if callable(mode):
        return mode(steps)
    first = first_steps(steps)
    if steps < first + 2:
        raise CvxError(
            f"{steps} steps are too few to forecast any of them: {first} and the last are run",
            fix=f"use --steps {first + 2} or more, or leave the cache out",
        )
    forecast = forecast_for(scheduler, request.guidance_scale)
    if mode == "adaptive":
        return _adaptive(request.cache_tolerance, scheduler, first, forecast)
    calls = calls_for(steps, request.cache_speedup)
    if calls <= first:
        raise CvxError(
            f"{steps} steps with a cache speedup of {request.cache_speedup} leave {calls} calls of the transformer, "
            f"and {first} steps and the last are always run",
            fix=f"use --cache-speedup {_floor(steps / (first + 1))} or less, or more --steps",
        )
    calibrated = None if calls >= steps else _calibrated(request, scheduler, bundle, calls)
    return calibrated or FixedPolicy(spread(steps, calls, first), forecast)


def _calibrated(request: "RunRequest", scheduler: Scheduler, bundle: Bundle, calls: int) -> FixedPolicy | None:
    """Return the policy that the bundle's own table says, or None for the mask that needs none.

    That one is taken where the bundle has no table, and for ``--fast``, which takes what there is.
    """
    table = _table_for(request, scheduler, bundle)
    if table is None:
        return None
    mask = table.mask(calls)
    if mask is None:
        if request.fast:
            return None
        there = " or ".join(f"{table.steps / len(one.run):.4g}" for one in table.masks)
        raise CalibrationError(
            f"the bundle's table of steps has no mask of {calls} calls",
            fix=f"use --cache-speedup {there}, or calibrate with --speedup {request.cache_speedup or SPEEDUP:g}",
        )
    weights = dict(zip(mask.forecast, mask.weights, strict=True))
    actions: tuple[Action, ...] = tuple("run" if step in mask.run else "forecast" for step in range(table.steps))
    return FixedPolicy(actions, Forecast("x0", 1, weights))


def _table_for(request: "RunRequest", scheduler: Scheduler, bundle: Bundle) -> StepTable | None:
    """Return the bundle's table for such a run; none may be missing where there are others, but for ``--fast``."""
    tables = bundle.manifest.step_tables
    kind = request.scheduler or bundle.manifest.scheduler["kind"]
    mine = (bundle.shape, kind, request.steps, request.guidance_scale)
    whole = scheduler.start == 0 and not request.dynamic_cfg
    table = next((one for one in tables if whole and one.conditions == mine), None)
    again = f"cvx-deploy calibrate-cache --bundle {bundle.path} --prompts FILE --shape {bundle.shape}"
    again += f" --scheduler {kind} --steps {request.steps} --guidance-scale {request.guidance_scale:g}"
    if table is not None and table.model != digest_of(bundle):
        raise CalibrationError(
            "the bundle's table of steps was made with other weights, graphs or another noise schedule",
            fix=f"run: {again}",
        )
    if table is None and tables and not request.fast:
        instead = "" if whole else ", from a video or with dynamic guidance, for which none can be made"
        raise CalibrationError(
            f"the bundle has tables of steps for {'; '.join(map(str, tables))}; this run has {request.steps} steps of "
            f"{kind} at guidance {request.guidance_scale:g}, {bundle.shape}{instead}",
            fix=f"run: {again}, or use --fast" if whole else "use --fast, or --cache adaptive",
        )
    return table


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
