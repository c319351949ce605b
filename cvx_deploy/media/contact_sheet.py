"""A contact sheet: evenly chosen frames of each video in a row, one row a video, to see a run at a glance."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cvx_deploy.files import staged_file
from cvx_deploy.media.encoders import VideoFormat, as_bytes

COLUMNS = 9


class ContactSheet:
    """Collects frames while they are decoded; the first and the last of each video are among them.

    Args:
        video: The videos that will come; those of more than `COLUMNS` frames show `COLUMNS` of them.
    """

    def __init__(self, video: VideoFormat) -> None:
        self._video = video
        chosen = np.linspace(0, video.frames - 1, min(COLUMNS, video.frames)).round().astype(int)
        self._columns = {int(frame): column for column, frame in enumerate(chosen)}
        self._gap = max(video.width // 32, 1)
        width, height = (
            count * (side + self._gap) - self._gap
            for count, side in ((len(chosen), video.width), (video.videos, video.height))
        )
        self._sheet = Image.new("RGB", (width, height), "white")
        self._taken = 0

    def add(self, frames: NDArray[np.float32]) -> None:
        """Take the next frames, (n, height, width, 3), RGB in [0, 1]."""
        for pixels in frames:
            row, frame = divmod(self._taken, self._video.frames)
            if frame in self._columns:
                x = self._columns[frame] * (self._video.width + self._gap)
                self._sheet.paste(Image.fromarray(as_bytes(pixels)), (x, row * (self._video.height + self._gap)))
            self._taken += 1

    def save(self, path: Path) -> None:
        """Write a PNG; an earlier one stays until the new one is whole."""
        with staged_file(path) as temporary:
            self._sheet.save(temporary, format="PNG")
