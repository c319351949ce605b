"""Steps that are forecast: what stays the same, what is saved, and how far the video is from the full run's."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from cvx_deploy import Pipeline
from cvx_deploy.bundle.opened import Bundle
from cvx_deploy.engines.onnxruntime.backend import OrtBackend
from cvx_deploy.errors import CvxError
from cvx_deploy.families.cogvideox.models import SchedulerKind
from cvx_deploy.measure.difference import psnr
from cvx_deploy.measure.thresholds import FORECAST
from cvx_deploy.miniatures import miniature
from cvx_deploy.pipeline.caching import policy_for
from cvx_deploy.pipeline.events import Step
from cvx_deploy.pipeline.forecast import Forecast, Forecaster
from cvx_deploy.pipeline.noise import Generator
from cvx_deploy.pipeline.policy import Action, AdaptivePolicy, CleanLatentsPolicy, FixedPolicy, spread
from cvx_deploy.pipeline.report import RunReport
from cvx_deploy.pipeline.request import RunRequest
from cvx_deploy.pipeline.run import make_latents
from cvx_deploy.pipeline.schedulers import SchedulerConfig, make_scheduler
from cvx_deploy.progress import SilentProgress
from tests.command import cvx

PROMPT = "a red circle moves to the right"
KINDS: tuple[SchedulerKind, ...] = ("ddim", "dpm")
STEPS = 8


@cache
def pipeline(name: str = "mini") -> Pipeline:
    return Pipeline.from_pretrained(name)


@cache
def full(kind: SchedulerKind) -> NDArray[np.float32]:
    """Return the video of 50 steps, all of them run."""
    return pipeline()(PROMPT, scheduler=kind, seed=3).frames[0]


def masked(*actions: Action, order: Any = 1) -> Any:
    """Return a maker of policies with a mask that goes around."""

    def make(steps: int) -> FixedPolicy:
        return FixedPolicy(tuple((actions * steps)[:steps]), Forecast("x0", order))

    return make


MODES: dict[str, dict[str, Any]] = {
    "guidance": {"guidance_scale": 6.0},
    "no guidance": {"guidance_scale": 1.0},
    "dynamic guidance": {"guidance_scale": 6.0, "use_dynamic_cfg": True},
    "several": {"prompt": [PROMPT, "a blue square grows"]},
    "video": {"video": np.random.default_rng(0).random((9, 48, 48, 3)), "strength": 0.7},
}


def latents(name: str = "mini", **wanted: Any) -> NDArray[np.float32]:
    prompt = wanted.pop("prompt", PROMPT)
    return pipeline(name)(prompt, num_inference_steps=STEPS, output_type="latent", **wanted).latents


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", MODES)
def test_a_policy_that_never_forecasts_gives_the_same_bytes_as_none(mode: str, kind: SchedulerKind) -> None:
    plain = latents(scheduler=kind, **MODES[mode])
    for never in ({"cache": masked("run")}, {"cache": "fixed", "cache_speedup": 1.0}):
        assert np.array_equal(latents(scheduler=kind, **MODES[mode], **never), plain)
    assert np.array_equal(latents(scheduler=kind, **MODES[mode], cache="adaptive", cache_tolerance=0.0), plain)
    assert not np.array_equal(latents(scheduler=kind, **MODES[mode], fast=True), plain)


def test_image_to_video_is_forecast_too() -> None:
    image = np.random.default_rng(0).random((48, 48, 3))
    plain = latents("mini-i2v", image=image)
    assert np.array_equal(latents("mini-i2v", image=image, cache=masked("run")), plain)
    found = latents("mini-i2v", image=image, fast=True)
    assert 0 < np.abs(found - plain).max() < np.abs(plain).max()


@pytest.mark.parametrize("mode", MODES)
def test_every_video_of_a_run_that_forecasts_is_the_same_again_and_alone(mode: str) -> None:
    wanted = {**MODES[mode], "fast": True, "scheduler": "dpm"}
    both = latents(**wanted)
    assert np.array_equal(latents(**wanted), both)
    if mode == "several":
        alone = latents(prompt="a blue square grows", fast=True, scheduler="dpm", seed=1)
        assert np.array_equal(both[1:], alone)


def test_several_devices_forecast_as_one_does() -> None:
    bundle = Bundle.open(miniature("mini"))
    request = RunRequest((PROMPT, "a blue square grows"), None, steps=STEPS, fast=True, num_videos=2)
    reports = RunReport(), RunReport()
    one = make_latents(OrtBackend(bundle), request, SilentProgress(), reports[0])
    two = make_latents(OrtBackend(bundle), request, SilentProgress(), reports[1], [OrtBackend(bundle)])
    assert np.array_equal(one, two)
    assert reports[0].steps == reports[1].steps
    assert sorted(reports[0].steps) == [0, 1, 2, 3]


class Counting(OrtBackend):
    """Counts what the transformer is run for: the batch of each call."""

    def __init__(self, bundle: Bundle) -> None:
        super().__init__(bundle)
        self.batches: list[int] = []

    def load(self, role: str, sizes: Mapping[str, int]) -> Any:
        """Watch the transformer's session."""
        loaded = super().load(role, sizes)
        return loaded if role != "transformer" else _Watched(loaded, self.batches)


@dataclass
class _Watched:
    loaded: Any
    batches: list[int]

    def __enter__(self) -> Any:
        self.session = self.loaded.__enter__()
        return self

    def __exit__(self, *error: Any) -> Any:
        return self.loaded.__exit__(*error)

    def run(self, inputs: Mapping[str, Any]) -> Any:
        self.batches.append(len(inputs["hidden_states"]))
        return self.session.run(inputs)


def test_the_transformer_is_run_where_the_policy_says_so_and_nowhere_else() -> None:
    backend, report = Counting(Bundle.open(miniature("mini"))), RunReport()
    request = RunRequest((PROMPT,), None, steps=6, cache=masked("run", "run", "conditional", "forecast"))
    make_latents(backend, request, SilentProgress(), report)
    assert backend.batches == [2, 2, 1, 2, 2]
    taken = report.steps[0]
    assert (taken.run, taken.conditional, taken.forecast) == ((0, 1, 4, 5), (2,), (3,))
    assert taken.error is not None
    assert 0 < taken.error < 1


def test_without_guidance_there_is_one_branch_to_run() -> None:
    backend = Counting(Bundle.open(miniature("mini")))
    policy = masked("run", "conditional", "forecast")
    request = RunRequest((PROMPT,), None, steps=6, guidance_scale=1.0, cache=policy)
    make_latents(backend, request, SilentProgress(), RunReport())
    assert backend.batches == [1, 1, 1, 1]


def test_a_step_that_is_forecast_draws_what_one_that_is_run_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    draws: list[list[tuple[int, ...]]] = []
    drawn = Generator.randn

    def randn(self: Generator, shape: tuple[int, ...]) -> Any:
        draws[-1].append(shape)
        return drawn(self, shape)

    monkeypatch.setattr(Generator, "randn", randn)
    for fast in (False, True):
        draws.append([])
        latents(scheduler="dpm", fast=fast)
    assert draws[0] == draws[1]
    assert len(draws[0]) > STEPS


def test_a_stream_says_of_each_step_whether_it_was_forecast() -> None:
    steps = [step for step in pipeline().stream(PROMPT, num_inference_steps=8, fast=True) if isinstance(step, Step)]
    assert [step.forecast for step in steps] == [action == "forecast" for action in spread(8, 4, 2)]
    plain = [step for step in pipeline().stream(PROMPT, num_inference_steps=2) if isinstance(step, Step)]
    assert not any(step.forecast for step in plain)


@pytest.mark.parametrize(("steps", "calls", "first"), [(50, 25, 4), (50, 19, 4), (8, 4, 2), (7, 7, 2), (100, 11, 8)])
def test_a_mask_runs_as_often_as_it_says_the_first_steps_and_the_last(steps: int, calls: int, first: int) -> None:
    mask = spread(steps, calls, first)
    assert len(mask) == steps
    assert mask.count("run") == calls
    assert mask[:first] == ("run",) * first
    assert mask[-1] == "run"
    places = [step for step, action in enumerate(mask) if action == "run"]
    gaps = np.diff(places[first - 1 :])
    assert all(np.diff(gaps) >= -1)  # they grow, but rounded


@pytest.mark.parametrize(("kind", "tolerances"), [("ddim", (0.05, 0.1, 0.4)), ("dpm", (0.02, 0.05, 0.1))])
def test_the_adaptive_rules_run_more_steps_for_a_smaller_tolerance(kind: SchedulerKind, tolerances: Any) -> None:
    wanted: dict[str, Any] = {"cache": "adaptive", "scheduler": kind, "output_type": "latent"}
    taken = [pipeline()(PROMPT, cache_tolerance=one, **wanted).report.steps[0] for one in tolerances]
    counts = [len(one.run) for one in taken]
    assert 50 > counts[0] > counts[1] > counts[2]
    assert all(one.run[:2] == (0, 1) and one.run[-1] == 49 for one in taken)


def test_the_adaptive_rule_is_that_of_easycache() -> None:
    """Outputs change twice as fast as latents, which move by 0.1 a step: of an output of 1, 0.2 at each step."""
    policy = AdaptivePolicy(20, 0.4, 2, Forecast("output", 0))
    actions = []
    for step in range(10):
        values = np.full((1, 1, 1, 1, 1), 1 + 0.1 * step, np.float32)
        action = policy.before(step, values)
        actions.append(action)
        if action == "run":
            policy.after(step, values, np.ones_like(values) + 0.2 * (step % 2))
    # After steps 0 and 1 a rate of 2: 0.2 of 1.2 a step, of which two are 0.33, and three 0.5.
    assert actions[:5] == ["run", "run", "forecast", "forecast", "run"]


def test_the_rule_for_samplers_that_draw_noise_follows_the_clean_latents() -> None:
    """They change by a hundredth a step, whatever latents do: at a tolerance of 0.025 two steps are forecast."""
    config = SchedulerConfig(prediction_type="sample", timestep_spacing="trailing")
    policy = CleanLatentsPolicy(make_scheduler("dpm", config, 20), 0.025, 2, Forecast("x0", 1))
    actions = []
    for step in range(20):
        latents = np.full((1, 1, 1, 1, 1), 100.0 * step, np.float32)
        actions.append(policy.before(step, latents))
        if actions[-1] == "run":
            policy.after(step, latents, np.full_like(latents, 1.01**step))
    assert actions == ["run", "run", *["forecast", "forecast", "run"] * 5, "forecast", "forecast", "run"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_fast_video_is_close_to_the_full_run(kind: SchedulerKind) -> None:
    video = pipeline()(PROMPT, scheduler=kind, seed=3, fast=True)
    assert psnr(video.frames[0], full(kind)) > FORECAST[kind].psnr
    assert len(video.report.steps[0].run) == 25


@pytest.mark.parametrize(
    ("kind", "guidance", "order"), [("ddim", 2.0, 1), ("ddim", 6.0, 1), ("dpm", 2.0, 1), ("dpm", 6.0, 0)]
)
def test_no_trend_is_followed_where_guidance_would_multiply_drawn_noise(
    kind: SchedulerKind, guidance: float, order: Any
) -> None:
    scheduler = make_scheduler(kind, SchedulerConfig(prediction_type="sample", timestep_spacing="trailing"), 20)
    for how in ({"fast": True}, {"cache": "adaptive"}):
        request: Any = RunRequest((PROMPT,), guidance_scale=guidance, **how)
        policy = policy_for(request, scheduler, Bundle.open(miniature("mini")))
        assert policy is not None
        assert policy.forecast == Forecast("x0", order)


@pytest.mark.parametrize("kind", KINDS)
def test_twin_a_forecast_with_its_sign_turned_is_not(kind: SchedulerKind, monkeypatch: pytest.MonkeyPatch) -> None:
    output = Forecaster.output
    monkeypatch.setattr(Forecaster, "output", lambda self, index, latents: -output(self, index, latents))
    found = pipeline()(PROMPT, scheduler=kind, seed=3, fast=True).frames[0]
    assert psnr(found, full(kind)) < FORECAST[kind].psnr


def test_twin_a_forecast_for_the_step_beside_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask shifted by one: what is foretold for one step is taken at the next."""
    output = Forecaster.output
    monkeypatch.setattr(Forecaster, "output", lambda self, index, latents: output(self, index - 1, latents))
    found = pipeline()(PROMPT, scheduler="ddim", seed=3, fast=True).frames[0]
    assert psnr(found, full("ddim")) < FORECAST["ddim"].psnr


@pytest.mark.parametrize(
    ("wanted", "what"),
    [
        ({"cache": "fixed", "cache_speedup": 0.5}, "a cache speedup of 0.5"),
        ({"cache": "fixed", "cache_speedup": float("nan")}, "a cache speedup of nan"),
        ({"cache": "fixed", "cache_speedup": 11.0}, "a cache speedup of 11"),
        ({"cache": "adaptive", "cache_tolerance": -0.1}, "a cache tolerance of -0.1"),
        ({"cache": "adaptive", "cache_tolerance": float("inf")}, "a cache tolerance of inf"),
        ({"cache": "fixed", "cache_tolerance": 0.1}, "--cache-tolerance is the dial of --cache adaptive"),
        ({"cache": "adaptive", "cache_speedup": 2.0}, "--cache-speedup is the dial of --cache fixed"),
        ({"cache": "sometimes"}, "cache 'sometimes'"),
        ({"fast": True, "cache": "fixed"}, "--cache beside --fast"),
        ({"cache_speedup": 2.0}, "--cache-speedup means nothing without --cache"),
        ({"fast": True, "num_inference_steps": 3}, "3 steps are too few"),
        ({"cache": "fixed", "cache_speedup": 10.0, "num_inference_steps": 20}, "leave 2 calls"),
        ({"fast": True, "video": np.zeros((9, 48, 48, 3)), "strength": 0.05}, "2 steps are too few"),
        ({"cache": masked("forecast")}, "says 'forecast' of the first step"),
    ],
)
def test_dials_that_make_no_sense_are_refused(wanted: dict[str, Any], what: str) -> None:
    with pytest.raises(CvxError, match=what.replace("(", r"\(")):
        pipeline()(PROMPT, **wanted)


def test_what_a_refused_speedup_offers_instead_works() -> None:
    with pytest.raises(CvxError, match=r"use --cache-speedup 6\.66 or less"):
        pipeline()(PROMPT, cache="fixed", cache_speedup=10.0, num_inference_steps=20)
    report = pipeline()(PROMPT, cache="fixed", cache_speedup=6.66, num_inference_steps=20).report
    assert len(report.steps[0].run) == 3


def test_the_command_says_which_steps_it_ran(tmp_path: Path) -> None:
    args = ("run", "--prompt", PROMPT, "--steps", "10", "--output", tmp_path / "v.npy")
    told = json.loads(cvx(*args, "--fast", "--json").out)
    (taken,) = told["steps"]
    assert sorted(taken["run"] + taken["forecast"]) == list(range(10))
    assert len(taken["run"]) == 5
    assert taken["conditional"] == []
    assert 0 < taken["error"] < 1
    assert json.loads(cvx(*args, "--json").out)["steps"] == []


def test_the_command_refuses_before_any_work(tmp_path: Path) -> None:
    line = cvx("run", "--prompt", "x", "--cache-speedup", "2", "--output", tmp_path / "v.npy").failure()
    assert line.startswith("error: --cache-speedup means nothing without --cache")
    line = cvx("run", "--prompt", "x", "--steps", "3", "--fast", "--output", tmp_path / "v.npy").failure()
    assert "3 steps are too few to forecast" in line
    assert not list(tmp_path.iterdir())
