"""Videos on their way into files: at the rate that is asked for, with a picture of some of their frames."""

from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from cvx_deploy.media.contact_sheet import ContactSheet
from cvx_deploy.media.encoders import VideoFormat
from cvx_deploy.media.interpolation import Interpolation, Rate
from cvx_deploy.media.write import open_writer


class Film:
    """Takes the frames of one video after another, as a model makes them.

    Args:
        output: Where they go; see `media.write`.
        made: What is made.
        fps: Frames a second of the files; None for those that are made.
        contact_sheet: Where to put a picture of some frames of each video, once all is well.

    Attributes:
        rate: Frames a second, made and written.
        form: What is written.
        interpolated: The numbers of the frames of each video that no model made.
        paths: The finished videos.
    """

    def __init__(self, output: Path | str, made: VideoFormat, fps: int | None, contact_sheet: Path | None) -> None:
        self.rate = Rate(made.fps, made.fps if fps is None else fps)
        self.form = replace(made, frames=self.rate.count(made.frames), fps=self.rate.wanted)
        self.interpolated = [index for index in range(self.form.frames) if not self.rate.is_made(index)]
        self.paths: tuple[Path, ...] = ()
        self._frames, self._taken = made.frames, 0
        self._between = Interpolation(self.rate)
        self._place = contact_sheet
        self._sheet = None if contact_sheet is None else ContactSheet(self.form)
        self._writer = open_writer(output, self.form)

    def __enter__(self) -> Self:
        self._writer.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.__exit__(kind, error, trace)
        if kind is None:
            self.paths = self._writer.paths
            if self._sheet is not None and self._place is not None:
                self._sheet.save(self._place)

    def add(self, frames: NDArray[np.float32]) -> None:
        """Write the next frames, (n, H, W, 3) in [0, 1], and those between them; none may be of the next video."""
        for written in [frames] if self.rate.is_kept else self._between.add(frames):
            self._writer.write(written)
            if self._sheet is not None:
                self._sheet.add(written)
        self._taken += len(frames)
        if self._taken % self._frames == 0:
            self._between = Interpolation(self.rate)
