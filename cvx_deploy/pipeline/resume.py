"""Where the denoising of a video stands after a step, so that a run that was cut off goes on from there.

What comes of it is what the run would have made undisturbed, to the bit: a point holds everything that later steps
depend on and that is not made anew from the request.
"""

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from cvx_deploy.errors import MediaError, ShapeError
from cvx_deploy.files import staged_file
from cvx_deploy.pipeline.noise import Generator, NoiseState
from cvx_deploy.pipeline.schedulers import Scheduler
from cvx_deploy.reading import check_regular, reading

Latents = NDArray[np.float32]
_WORDS = 624  # of a Mersenne Twister
_FIX = "remove it, and begin the video anew"


@dataclass(frozen=True)
class ResumePoint:
    """A video after some of its steps.

    Attributes:
        taken: How many steps it has taken, from 1.
        count: How many it takes in all.
        latents: After them, float32 (1, F, C, H, W).
        previous: The clean latents that the last step foretold, where the scheduler looks back at them.
        noise: The state of the generator that draws for the steps to come.
    """

    taken: int
    count: int
    latents: Latents
    previous: Latents | None
    noise: NoiseState

    @classmethod
    def after(cls, taken: int, latents: Latents, scheduler: Scheduler, generator: Generator) -> Self:
        """Return the point that a run is at; what it refers to is not changed by the steps that follow."""
        count = len(scheduler.timesteps) - scheduler.start
        return cls(taken, count, latents, scheduler.previous_original, generator.state())

    def restore(self, latents: Latents, scheduler: Scheduler, generator: Generator) -> Latents:
        """Put a fresh scheduler and a fresh generator in that state, and return the latents to go on with.

        Args:
            latents: What a run from the beginning would start from.
            scheduler: Of the same kind, with as many steps.
            generator: Of any state.

        Raises:
            ShapeError: The point is of a video of another size, or of other steps.
        """
        count = len(scheduler.timesteps) - scheduler.start
        if self.latents.shape != latents.shape or self.count != count:
            raise ShapeError(
                f"the point to resume from is of {self.count} steps and latents {self.latents.shape}, and the run of "
                f"{count} and {latents.shape}",
                fix="resume with what the run was begun with, or leave resume out",
            )
        scheduler.previous_original = self.previous
        generator.restore(self.noise)
        return self.latents

    def save(self, path: Path) -> None:
        """Write it to a ``.npz`` file, whole or not at all."""
        arrays: dict[str, NDArray[Any]] = {
            "steps": np.array([self.taken, self.count, self.noise.position], np.int64),
            "latents": self.latents,
            "words": self.noise.words,
        }
        if self.previous is not None:
            arrays["previous"] = self.previous
        if self.noise.spare is not None:
            arrays["spare"] = np.array([self.noise.spare], np.float64)
        with staged_file(path) as temporary, temporary.open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote.

        Raises:
            MediaError: There is no such file, or it is damaged.
        """
        check_regular(path, MediaError, fix=_FIX)
        with reading(path, MediaError, fix=_FIX, says="is no point to resume from"):
            if not zipfile.is_zipfile(path):
                raise ValueError("it is no archive")
            with np.load(path, allow_pickle=False) as arrays:
                taken, count, position = map(int, arrays["steps"])
                words, latents = arrays["words"], arrays["latents"]
                previous = arrays.get("previous")
                spare = float(arrays["spare"][0]) if "spare" in arrays else None
            if words.shape != (_WORDS,) or words.dtype != np.uint32 or not 0 <= position <= _WORDS:
                raise ValueError("it has no state of a generator")
            if not 1 <= taken <= count or latents.dtype != np.float32:
                raise ValueError("its steps or its latents make no sense")
            return cls(taken, count, latents, previous, NoiseState(words, position, spare))
