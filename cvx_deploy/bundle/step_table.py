"""The tables of ``cvx-deploy calibrate-cache``: which steps of a schedule are run, and how the others are forecast."""

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import msgspec

from cvx_deploy.bounds import Factor, Positive
from cvx_deploy.families.cogvideox.models import SchedulerKind
from cvx_deploy.shape import Shape

if TYPE_CHECKING:
    from cvx_deploy.bundle.opened import Bundle

MOST_STEPS = 100
"""The most steps a table is made for: the work of finding masks grows with their cube."""
FEWEST_STEPS = 5
"""The first three and the last are always run, and one is to be forecast."""

Weights = tuple[Factor, Factor, Factor, Factor]
Place = Annotated[int, msgspec.Meta(ge=0, lt=MOST_STEPS)]


@dataclass(frozen=True)
class StepMask:
    """One choice of the steps that are run.

    Attributes:
        run: These, counted from 0, in order: the first two and the last among them.
        weights: Of each other step, in order: what the clean latents of the last run and of the one before are
            multiplied by, first those of the prompt's branch, then the difference of the two branches.
    """

    run: tuple[Place, ...]
    weights: tuple[Weights, ...]

    @property
    def forecast(self) -> tuple[int, ...]:
        """The other steps."""
        return tuple(step for step in range(self.run[-1] + 1) if step not in self.run)


@dataclass(frozen=True)
class StepTable:
    """The best masks for one schedule of one model.

    Attributes:
        model: A digest of the transformer's graphs, their weights and the scheduler's config; see `digest_of`.
        shape: The video size.
        scheduler: Its kind, and `steps` how many there are.
        guidance_scale: As it was calibrated.
        masks: Each of another number of calls.
        prompts: SHA-256 of the prompts they were found with, `prompt_count` how many, and `seed` that of the first.
    """

    model: str
    shape: Shape
    scheduler: SchedulerKind
    steps: Annotated[int, msgspec.Meta(ge=FEWEST_STEPS, le=MOST_STEPS)]
    guidance_scale: Annotated[float, msgspec.Meta(ge=0, le=1000)]
    masks: Annotated[tuple[StepMask, ...], msgspec.Meta(min_length=1)]
    prompts: str
    prompt_count: Positive
    seed: int

    def __post_init__(self) -> None:
        for mask in self.masks:
            ends = mask.run[:2] == (0, 1) and mask.run[-1] == self.steps - 1
            if not ends or list(mask.run) != sorted(set(mask.run)) or len(mask.run) + len(mask.weights) != self.steps:
                raise ValueError(f"a mask of its table of steps does not fit {self.steps} steps")

    @property
    def conditions(self) -> tuple[Shape, SchedulerKind, int, float]:
        """What a run must have for the table to hold."""
        return self.shape, self.scheduler, self.steps, self.guidance_scale

    def mask(self, calls: int) -> StepMask | None:
        """Return the mask of so many calls."""
        return next((mask for mask in self.masks if len(mask.run) == calls), None)

    def __str__(self) -> str:
        calls = ", ".join(str(len(mask.run)) for mask in self.masks)
        return (
            f"{self.steps} steps of {self.scheduler} at guidance {self.guidance_scale:g}, {self.shape}: masks of "
            f"{calls} calls, calibrated on {self.prompt_count} prompts"
        )


def digest_of(bundle: "Bundle") -> str:
    """Return what tells a bundle's denoiser, at its shape, from every other: graphs, weights, scheduler's config."""
    digest = hashlib.sha256(json.dumps(bundle.manifest.scheduler["config"], sort_keys=True).encode())
    for role in ("modulation", "transformer"):
        network = bundle.network(role)
        for sha256 in (network.file.sha256, *(bundle.manifest.weights[name].sha256 for name in network.weights)):
            digest.update(sha256.encode())
    return digest.hexdigest()
