"""Videos out: frames stream into a file while they are decoded, and nothing partial is ever left behind.

What a path ends in says what is written: ``.mp4``, ``.webm``, ``.gif``, ``.npy``, or a folder of PNG frames. Each grows
where `cvx_deploy.files` stages it, and takes its place when it is whole.
"""

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import av
import numpy as np
from numpy.typing import NDArray

from cvx_deploy.errors import MediaError, OutputError, ShapeError
from cvx_deploy.files import check_unlocked, staged_directory, staged_file
from cvx_deploy.media.encoders import CODECS, ENCODERS, FOLDER, Encoder, VideoFormat

_FRAME_NAME = re.compile(r"\d{4,}\.png")


class _UnfinishedError(Exception):
    """A video that will not be whole."""


class VideoWriter:
    """Takes the frames of one video after another; each appears under its name as soon as it is whole.

    Attributes:
        paths: Where the videos go: one path each, or one for all (``.npy``).
    """

    def __init__(self, path: Path | str, video: VideoFormat) -> None:
        self.paths = _paths(path, video.videos)
        self._targets = [_resolved(place) for place in self.paths]
        self._folder = _suffix(path) == FOLDER
        self._encoder_for = ENCODERS[_suffix(path)]
        self._video = video
        self._frames_per_path = video.frames * video.videos // len(self.paths)
        self._written = 0
        self._encoder: Encoder | None = None
        self._staging = ExitStack()

    def write(self, frames: NDArray[np.float32]) -> None:
        """Append the next frames of the current video; no chunk may reach into the next one.

        Args:
            frames: (n, height, width, 3), RGB in [0, 1].

        Raises:
            ShapeError: They are of another size, or more than this video still takes.
            MediaError: A value is not a number, or outside [0, 1].
            OutputError: The place is full or went away.
        """
        self._check(frames)
        index = self._written // self._frames_per_path
        with _stating(self.paths[index]):
            if self._encoder is None:
                temporary = self._staging.enter_context(_staged(self._targets[index], self._folder))
                self._encoder = self._encoder_for(temporary, self._video)
            self._encoder.add(frames)
            self._written += len(frames)
            if self._written % self._frames_per_path == 0:
                self._encoder.finish()
                self._encoder = None
                self._publish(self._targets[index])

    def _publish(self, target: Path) -> None:
        """Let a whole video, a file or a folder of frames, take its place."""
        with self._staging.pop_all():
            if self._folder:
                _check_folder(target)  # hours may have passed

    def _check(self, frames: NDArray[np.float32]) -> None:
        video = self._video
        left = min(video.frames - self._written % video.frames, video.frames * video.videos - self._written)
        if frames.ndim != 4 or frames.shape[1:] != (video.height, video.width, 3) or not 0 < len(frames) <= left:
            raise ShapeError(
                f"frames of shape {frames.shape} do not fit the video, which takes up to {left} more "
                f"of {video.height}x{video.width}x3",
                fix="write each video's frames in order, in chunks that end with it",
            )
        if not (np.min(frames) >= 0 and np.max(frames) <= 1):
            raise MediaError(
                f"frames from number {self._written % video.frames} hold values that are not in [0, 1] or not numbers",
                fix="if they are not numbers, the precision overflowed: export with bf16 or fp32",
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._encoder is not None:
            # Whatever broke is on its way up already; closing a broken file can only repeat it.
            with suppress(OSError, av.FFmpegError):
                self._encoder.close()
        expected = self._video.frames * self._video.videos
        # What is staged goes, whatever ended the block; a whole video is in its place already.
        self._staging.__exit__(_UnfinishedError, _UnfinishedError(), None)
        if kind is None and self._written < expected:
            raise OutputError(
                f"{self.paths[-1]}: {self._written} of {expected} frames were given", fix="run it again to the end"
            )


def open_writer(path: Path | str, video: VideoFormat) -> VideoWriter:
    """Open what `path` names by its suffix, and create the folders above it.

    Args:
        path: A file, or a folder (an existing one, a name without a suffix, or a string that ends in a slash).
        video: What will be written.

    Raises:
        OutputError: See `check_writable`.
        ShapeError: The encoder cannot do this size.
    """
    check_writable(path, video.videos)
    if _suffix(path) in (".mp4", ".webm") and (video.height % 2 or video.width % 2):
        raise ShapeError(
            f"{video.height}x{video.width}: video with half-size colour needs even sizes",
            fix="use multiples of 8, or write a .gif, a .npy or a folder",
        )
    return VideoWriter(path, video)


def check_writable(path: Path | str, videos: int = 1) -> None:
    """Make sure, before hours of work, that videos can be put at `path`; creates nothing.

    Raises:
        OutputError: The suffix is unknown or its encoder is not installed; a folder above is a file or cannot be
            written; `path` is something that must not be replaced.
    """
    with _stating(path):
        suffix = _suffix(path)
        if suffix in CODECS:
            CODECS[suffix].encoder()
        for target in _paths(path, videos):
            _check_parent(target)
            check_unlocked(target)
            if suffix == FOLDER:
                _check_folder(target)
            else:
                _check_file(target)


def check_file_place(path: Path) -> None:
    """Make sure that a file can be put at `path`, in a folder that exists; creates nothing.

    Raises:
        OutputError: It cannot.
    """
    with _stating(path):
        if not path.parent.is_dir():
            raise OutputError(f"{path} cannot be written", fix="name a file in a folder that exists")
        _check_parent(path)
        _check_file(path)


def numbered(path: Path | str, index: int, count: int) -> Path:
    """Name the place of video `index` of `count`: ``out-0.mp4`` for several, ``out/0`` in a folder, one ``.npy``."""
    suffix, path = _suffix(path), Path(path)
    if count == 1 or suffix == ".npy":
        return path
    return path / str(index) if suffix == FOLDER else path.with_stem(f"{path.stem}-{index}")


def _suffix(path: Path | str) -> str:
    """Tell what a path names: a key of ENCODERS."""
    if str(path).endswith("/") or Path(path).is_dir():
        return FOLDER
    suffix = Path(path).suffix.lower()
    if Path(path).name.lower() in ENCODERS:
        raise OutputError(f"{path} is a suffix, not a name", fix=f"name a file, such as video{Path(path).name}")
    if suffix not in ENCODERS:
        known = ", ".join(filter(None, ENCODERS))
        raise OutputError(f"{path}: nothing here writes {suffix}", fix=f"end it in {known}, or in / for a folder")
    return suffix


def _paths(path: Path | str, videos: int) -> tuple[Path, ...]:
    return tuple(dict.fromkeys(numbered(path, index, videos) for index in range(videos)))


def _resolved(path: Path) -> Path:
    """Follow links: what they point to is replaced. Never raises, unlike Path.resolve on a loop."""
    return Path(os.path.realpath(path))


def _staged(target: Path, folder: bool) -> AbstractContextManager[Path]:
    """Stage a video, which replaces an earlier one of its kind."""
    return staged_directory(target, replace=True) if folder else staged_file(target)


def _check_parent(path: Path) -> None:
    """Find the nearest folder above that exists, and try it: permission bits do not stop root, and mounts differ."""
    parent = next(folder for folder in _resolved(path).parents if folder.exists())
    if not parent.is_dir():
        raise OutputError(f"{path}: {parent} is not a folder", fix="choose another --output")
    tempfile.TemporaryFile(dir=parent).close()


def _check_file(path: Path) -> None:
    if path.exists() and not path.is_file():
        raise OutputError(f"{path} exists and is not a file", fix="choose another --output")
    if path.exists() and not os.access(path, os.W_OK):
        raise OutputError(f"{path} exists and is write-protected", fix="choose another --output, or make it writable")


def _check_folder(path: Path) -> None:
    """Accept a folder only when it is new, empty, or holds nothing but frames: it will be replaced as a whole."""
    folder = _resolved(path)
    if not folder.exists():
        return
    if not folder.is_dir():
        raise OutputError(f"{path} is a file, and no suffix means a folder", fix="choose another --output")
    if folder.is_mount() or folder == Path.cwd():
        raise OutputError(f"{path} is in use and cannot be replaced", fix=f"name a folder inside it: {path / 'video'}")
    foreign = next((e.name for e in folder.iterdir() if not (_FRAME_NAME.fullmatch(e.name) and e.is_file())), None)
    if foreign is not None:
        raise OutputError(f"{path} holds {foreign}, which is not a frame", fix="choose a new or an empty folder")


@contextmanager
def _stating(path: Path | str) -> Iterator[None]:
    """Turn what the system and FFmpeg raise into one stated failure."""
    try:
        yield
    except (OSError, av.FFmpegError) as error:
        raise OutputError(
            f"{path} cannot be written: {error.strerror or error}",
            fix="choose another --output, or make room or give permission there",
        ) from error
