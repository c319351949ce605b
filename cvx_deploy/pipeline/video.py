"""What a `Pipeline` gives back: finished videos, as arrays and as files."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from cvx_deploy.media.encoders import VideoFormat
from cvx_deploy.media.write import open_writer
from cvx_deploy.pipeline.report import RunReport

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Video:
    """One or more finished videos of a run.

    Attributes:
        frames: float32 (videos, frames, height, width, 3), RGB in [0, 1].
        latents: What they were decoded from, float32 (videos, F, C, H, W), without padding.
        fps: Frames a second.
        seeds: One a video: with it alone, and its prompt, the same video is made again.
        report: What was done when.
    """

    frames: NDArray[np.float32]
    latents: NDArray[np.float32]
    fps: int
    seeds: tuple[int, ...]
    report: RunReport

    def save(self, path: Path | str) -> tuple[Path, ...]:
        """Write the videos, and return where they are.

        Args:
            path: A ``.mp4``, ``.webm``, ``.gif`` or ``.npy`` file, or a folder for PNG frames; of several videos
                ``out.mp4`` becomes ``out-0.mp4``, ``out-1.mp4``, and one ``.npy`` holds all.

        Raises:
            OutputError: It cannot be written there; nothing half-written is left, and an earlier file is as it was.
        """
        videos, frames, height, width, _ = self.frames.shape
        with open_writer(path, VideoFormat(frames, height, width, self.fps, videos=videos)) as writer:
            for video in self.frames:
                writer.write(video)
        return writer.paths

    def images(self) -> "list[list[Image]]":
        """Return every frame as a PIL image, a list for each video."""
        from PIL import Image

        from cvx_deploy.media.encoders import as_bytes

        return [[Image.fromarray(frame) for frame in as_bytes(video)] for video in self.frames]
