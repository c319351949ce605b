"""Which steps are best run where the others are forecast, found on full trajectories of the model itself."""

import os
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cvx_deploy.bundle.opened import MANIFEST, Bundle
from cvx_deploy.bundle.step_table import FEWEST_STEPS, MOST_STEPS, StepTable, digest_of
from cvx_deploy.engines.backend import Backend
from cvx_deploy.errors import BundleError, CalibrationError, OutputError
from cvx_deploy.families.cogvideox.models import SchedulerKind
from cvx_deploy.files import staged_file
from cvx_deploy.miniatures import is_packaged
from cvx_deploy.pipeline.caching import calls_for, check_speedup, first_steps
from cvx_deploy.pipeline.events import Event
from cvx_deploy.pipeline.forecast import Forecast
from cvx_deploy.pipeline.policy import Action
from cvx_deploy.pipeline.report import RunReport
from cvx_deploy.pipeline.request import RunRequest
from cvx_deploy.pipeline.run import events, scheduler_for
from cvx_deploy.pipeline.schedulers import Scheduler
from cvx_deploy.pipeline.step_masks import Moments, best_masks, forecasts_of
from cvx_deploy.progress import Progress
from cvx_deploy.quantize.prompts import digest_of as digest_of_prompts

Latents = NDArray[np.float32]
SPEEDUPS = (1.5, 2.0, 2.6, 3.0)


@dataclass(frozen=True)
class CacheCalibration:
    """What to calibrate.

    Attributes:
        prompts: What is shown; every one is a whole run.
        steps: Of the schedule that `scheduler` makes.
        guidance_scale: As runs are going to have it.
        seed: Of the first prompt; each next one has one more.
        speedups: How many times less often the transformer is to be run: a mask for each.
        image: The first frame, for image-to-video models.

    Raises:
        CalibrationError: There are too few steps, or too many, or too few for a speedup.
        CvxError: A speedup is out of range.
    """

    prompts: tuple[str, ...]
    steps: int
    guidance_scale: float
    scheduler: SchedulerKind
    seed: int = 0
    speedups: tuple[float, ...] = SPEEDUPS
    image: Path | None = None

    def __post_init__(self) -> None:
        if not FEWEST_STEPS <= self.steps <= MOST_STEPS:
            raise CalibrationError(
                f"masks of {self.steps} steps cannot be calibrated",
                fix=f"use --steps from {FEWEST_STEPS} to {MOST_STEPS}",
            )
        for speedup in self.speedups:
            check_speedup(speedup, "--speedup")
            calls = calls_for(self.steps, speedup)
            if not self.first < calls < self.steps:
                raise CalibrationError(
                    f"a speedup of {speedup:g} leaves {calls} of {self.steps} steps to run; "
                    f"it takes {self.first + 1} to {self.steps - 1}",
                    fix="use a --speedup of 2, or more --steps",
                )

    @property
    def first(self) -> int:
        """How many steps are always run at the start: pure noise, at the first, foretells nothing."""
        return max(3, first_steps(self.steps))

    @property
    def calls(self) -> tuple[int, ...]:
        """How often the transformer is run with each mask."""
        return tuple(sorted({calls_for(self.steps, speedup) for speedup in self.speedups}))

    @property
    def request(self) -> RunRequest:
        """The runs that are recorded."""
        return RunRequest(
            self.prompts,
            image=self.image,
            steps=self.steps,
            guidance_scale=self.guidance_scale,
            scheduler=self.scheduler,
            seed=self.seed,
            latents_only=True,
        )


def check_writable_bundle(bundle: Bundle) -> None:
    """Raise BundleError where no table can be kept in a bundle, before any work for one."""
    if is_packaged(bundle.path):
        name = bundle.manifest.model
        raise BundleError(
            f"{name} comes with the package, and nothing is written there",
            fix=f"run: cvx-deploy export --model {name}, and calibrate that",
        )
    if not os.access(bundle.path, os.W_OK) or not os.access(bundle.path / MANIFEST, os.W_OK):
        raise OutputError(f"{bundle.path} cannot be written", fix="check its permissions, or copy the bundle")


def calibrate_cache(backend: Backend, wanted: CacheCalibration, progress: Progress) -> StepTable:
    """Run every prompt with all steps, and find the masks.

    Raises:
        CvxError: As a run of these prompts does.
    """
    bundle, request = backend.bundle, wanted.request
    scheduler, moments = scheduler_for(bundle.manifest, request), Moments(wanted.steps, wanted.guidance_scale)
    recorded = replace(request, cache=lambda _: _Recorder(scheduler, moments))
    happening: Generator[Event, None, None] = events(backend, recorded, progress, RunReport())
    with closing(happening):
        for _ in happening:
            pass
    forecasts = forecasts_of(moments, scheduler.influence, straight=not scheduler.draws_noise)
    return StepTable(
        digest_of(bundle),
        bundle.shape,
        wanted.scheduler,
        wanted.steps,
        wanted.guidance_scale,
        best_masks(forecasts, wanted.calls, wanted.first),
        digest_of_prompts(wanted.prompts),
        len(wanted.prompts),
        wanted.seed,
    )


def keep_table(path: Path, table: StepTable) -> None:
    """Write a table into the manifest of the bundle at `path`, in the place of one with the same conditions."""
    manifest = Bundle.read(path).manifest
    others = (one for one in manifest.step_tables if one.conditions != table.conditions)
    with staged_file(path / MANIFEST) as temporary:
        temporary.write_bytes(replace(manifest, step_tables=(*others, table)).to_json())


class _Recorder:
    """A step policy that runs every step of a video, and adds its clean latents up when it is done."""

    splits = False
    forecast = Forecast("x0", 0)

    def __init__(self, scheduler: Scheduler, moments: Moments) -> None:
        self._scheduler, self._moments = scheduler, moments
        self._conditional: list[Latents] = []
        self._difference: list[Latents] = []

    def before(self, step: int, latents: Latents) -> Action:
        """Run it."""
        return "run"

    def after(self, step: int, latents: Latents, output: Latents) -> None:
        """Keep the clean latents that the output stands for."""
        clean = self._scheduler.original(step, output, latents)
        self._conditional.append(clean[-1])
        if len(clean) == 2:
            self._difference.append(clean[1] - clean[0])
        if step == len(self._scheduler.timesteps) - 1:
            self._moments.add(self._conditional, self._difference)
            self._conditional, self._difference = [], []
