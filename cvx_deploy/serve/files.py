"""The files of one job, in a folder that its id names: what it starts from, where it stands, and what it made."""

import base64
import hashlib
import io
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Final, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cvx_deploy.errors import CvxError, OutputError
from cvx_deploy.files import staged_file
from cvx_deploy.longer.parts import Parts
from cvx_deploy.media.contact_sheet import ContactSheet
from cvx_deploy.media.encoders import VideoFormat, as_bytes
from cvx_deploy.media.interpolation import Interpolation, Rate
from cvx_deploy.media.read import frames_of
from cvx_deploy.media.write import VideoWriter, open_writer
from cvx_deploy.pipeline.pipeline import Pipeline
from cvx_deploy.pipeline.resume import ResumePoint
from cvx_deploy.serve.jobs import Spec

Variant = Literal["video", "thumbnail", "spritesheet"]
VARIANTS: Final[dict[Variant, tuple[str, str]]] = {
    "video": ("video.mp4", "video/mp4"),
    "thumbnail": ("thumbnail.jpg", "image/jpeg"),
    "spritesheet": ("spritesheet.png", "image/png"),
}
_SOURCE, _CONTINUED = "source.npy", "source.mp4"
SOURCES: Final = (_SOURCE, _CONTINUED)
"""Files of a job that are there before it begins."""
_PREVIEW = 320  # pixels of the longer side of a frame that is shown while the video is made
Frames = NDArray[np.float32]


class JobFiles:
    """See the module.

    Args:
        folder: It need not be there yet.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, variant: Variant) -> Path:
        """Return where something that clients can get lies."""
        return self.folder / VARIANTS[variant][0]

    def remove(self) -> None:
        """Remove all of it."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def keep_source(self, pixels: NDArray[np.uint8]) -> None:
        """Keep the first frame (H, W, 3), or the clip (F, H, W, 3), that the video starts from."""
        with staged_file(self.folder / _SOURCE) as temporary, temporary.open("wb") as file:
            np.save(file, pixels, allow_pickle=False)

    def keep_video(self, path: Path) -> None:
        """Keep a video that is continued."""
        with staged_file(self.folder / _CONTINUED) as temporary:
            shutil.copyfile(path, temporary)

    def continued(self, spec: Spec) -> Iterator[NDArray[np.uint8]]:
        """Yield the frames of the video that is continued, (H, W, 3) each."""
        return frames_of(self.folder / _CONTINUED, spec.height, spec.width)

    def parts(self, mark: str) -> Parts:
        """Return where the clips of a chain are kept; those of another mark go."""
        try:
            return Parts(self.path("video"), mark)
        except OutputError:
            shutil.rmtree(Parts.place(self.path("video")), ignore_errors=True)
            return Parts(self.path("video"), mark)

    def take_source_of(self, other: "JobFiles") -> None:
        """Keep what another job started from, too."""
        with staged_file(self.folder / _SOURCE) as temporary:
            shutil.copyfile(other.folder / _SOURCE, temporary)

    def source(self) -> NDArray[np.uint8]:
        """Return what `keep_source` kept."""
        pixels: NDArray[np.uint8] = np.load(self.folder / _SOURCE, allow_pickle=False)
        return pixels

    def point(self, mark: str) -> ResumePoint | None:
        """Return where the video stood last; None where it has not begun, or was begun under another mark."""
        try:
            return ResumePoint.load(self._point(mark))
        except CvxError:
            return None

    def save_point(self, mark: str, point: ResumePoint) -> None:
        """Keep where the video stands."""
        point.save(self._point(mark))

    def kept(self) -> dict[str, Path]:
        """Return, by their names within the folder, the files that whoever makes the video next goes on from."""
        folder = self.folder.resolve()
        places = (*folder.glob("point-*.npz"), *Parts.place(folder / self.path("video").name).glob("[!.]*"))
        return {str(path.relative_to(folder)): path for path in places}

    def sources(self) -> dict[str, Path]:
        """Return, likewise, the files that were there before it began."""
        return {name: path for name in SOURCES if (path := self.folder / name).exists()}

    def _point(self, mark: str) -> Path:
        return self.folder / f"point-{mark}.npz"

    @contextmanager
    def writing(self, spec: Spec) -> Iterator["Output"]:
        """Take the frames of the video; its files are there, whole, when the block ends well, and else not."""
        form = VideoFormat(spec.written, spec.height, spec.width, spec.fps)
        with open_writer(self.path("video"), form) as writer, ThreadPoolExecutor(1, "encoder") as beside:
            output = Output(writer, form, spec.rate, beside)
            yield output
            output.wait()
        output.sheet.save(self.path("spritesheet"))
        assert output.middle is not None
        with staged_file(self.path("thumbnail")) as temporary:
            Image.fromarray(output.middle).save(temporary, format="JPEG", quality=90)

    def finished(self) -> int:
        """Remove what only a running job needs, and return the bytes of what is left."""
        if not self.folder.is_dir():
            return 0
        for leftover in (*self.folder.glob("point-*.npz"), self.folder / _CONTINUED):
            leftover.unlink(missing_ok=True)
        shutil.rmtree(Parts.place(self.path("video")), ignore_errors=True)
        return sum(path.stat().st_size for path in self.folder.iterdir() if path.is_file())


class Output:
    """A video that grows: frames are encoded beside the caller, who decodes the next ones meanwhile.

    Attributes:
        sheet: Some of its frames in a row.
        middle: The frame in its middle, once it is there.
    """

    def __init__(self, writer: VideoWriter, form: VideoFormat, rate: Rate, beside: Executor) -> None:
        self._writer, self._at, self._count, self._beside = writer, form.frames // 2, 0, beside
        self._between = None if rate.is_kept else Interpolation(rate)
        self._pending: Future[None] | None = None
        self.sheet = ContactSheet(form)
        self.middle: NDArray[np.uint8] | None = None

    def add(self, frames: Frames) -> None:
        """Take the next frames that are made, (n, H, W, 3) in [0, 1], once those before are in the file.

        Raises what these met.
        """
        self.wait()
        self._pending = self._beside.submit(self._take, frames)

    def wait(self) -> None:
        """Wait until all frames are in the file."""
        if self._pending is not None:
            self._pending.result()

    def _take(self, frames: Frames) -> None:
        for written in [frames] if self._between is None else self._between.add(frames):
            self.copy(written)

    def follow(self, frame: Frames) -> None:
        """Let what is made follow a frame, (1, H, W, 3), that has been copied."""
        if self._between is not None:
            list(self._between.add(frame))

    def copy(self, frames: Frames) -> None:
        """Take frames as they are to be written; none may be on their way."""
        self._writer.write(frames)
        self.sheet.add(frames)
        if self._count <= self._at < self._count + len(frames):
            self.middle = as_bytes(frames[self._at - self._count])
        self._count += len(frames)

    def preview(self, frames: Frames) -> str:
        """Return the last of some frames, small, as a ``data:`` address."""
        picture = Image.fromarray(as_bytes(frames[-1]))
        picture.thumbnail((_PREVIEW, _PREVIEW))
        content = io.BytesIO()
        picture.save(content, format="JPEG", quality=80)
        return "data:image/jpeg;base64," + base64.b64encode(content.getvalue()).decode()


def fingerprint(pipelines: Iterable[Pipeline], spec: Spec) -> str:
    """Return a hash of all that a video's bits depend on: a point under another one is not gone on from."""
    made_by = [*(pipeline.identity for pipeline in pipelines), msgspec.json.encode(spec).decode()]
    return hashlib.sha256(repr(made_by).encode()).hexdigest()[:16]
