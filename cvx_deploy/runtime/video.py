"""Videos out: frames stream into a file while they are decoded, and nothing partial is ever left behind.

What a path ends in says what is written: ``.mp4``, ``.webm``, ``.gif``, ``.npy``, or a folder of PNG frames. Each file
grows under a temporary name beside its place and is renamed when it is whole; on any failure the temporary goes and an
earlier file stays as it was. With one build of PyAV the same frames give the same bytes on any number of cores.
"""

import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

import av
import numpy as np
from av.container import OutputContainer
from av.filter import Graph
from av.filter.context import FilterContext
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Colorspace
from av.video.stream import VideoStream
from numpy.typing import NDArray
from PIL import Image

from cvx_deploy.errors import MediaError, OutputError, ShapeError

_FOLDER = ""  # the key of a folder of PNG frames among the suffixes
_FRAME_NAME = re.compile(r"\d{4,}\.png")


@dataclass(frozen=True)
class VideoFormat:
    """What is about to be written.

    Attributes:
        frames: Frames of each video; `height` and `width` in pixels, `fps` in frames a second.
        videos: How many videos follow one another.
    """

    frames: int
    height: int
    width: int
    fps: int
    videos: int = 1


class VideoWriter:
    """Takes the frames of one video after another; each appears under its name as soon as it is whole.

    Attributes:
        paths: Where the videos go: one path each, or one for all (``.npy``).
    """

    def __init__(self, path: Path | str, video: VideoFormat) -> None:
        self.paths = _paths(path, video.videos)
        self._targets = [_resolved(place) for place in self.paths]
        self._encoder_for = ENCODERS[_suffix(path)]
        self._video = video
        self._frames_per_path = video.frames * video.videos // len(self.paths)
        self._written = 0
        self._encoder: _Encoder | None = None
        self._temporary: Path | None = None

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
            if self._encoder is None or self._temporary is None:
                self._temporary = _temporary(self._targets[index])
                self._encoder = self._encoder_for(self._temporary, self._video)
            self._encoder.add(frames)
            self._written += len(frames)
            if self._written % self._frames_per_path == 0:
                self._encoder.finish()
                self._encoder = None
                _publish(self._temporary, self._targets[index])

    def _check(self, frames: NDArray[np.float32]) -> None:
        video = self._video
        left = min(video.frames - self._written % video.frames, video.frames * video.videos - self._written)
        if frames.ndim != 4 or frames.shape[1:] != (video.height, video.width, 3) or not 0 < len(frames) <= left:
            raise ShapeError(
                f"frames of shape {frames.shape} do not fit the video, which takes up to {left} more "
                f"of {video.height}x{video.width}x3",
                fix="write each video's frames in order, in chunks that end with it",
            )
        if not (frames.min() >= 0 and frames.max() <= 1):
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
        if self._temporary is not None:
            _remove(self._temporary)
        expected = self._video.frames * self._video.videos
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
    writer = VideoWriter(path, video)
    with _stating(path):
        _resolved(writer.paths[0]).parent.mkdir(parents=True, exist_ok=True)  # all lie in one folder
    return writer


def check_writable(path: Path | str, videos: int = 1) -> None:
    """Make sure, before hours of work, that videos can be put at `path`; creates nothing.

    Raises:
        OutputError: The suffix is unknown or its encoder is not installed; a folder above is a file or cannot be
            written; `path` is something that must not be replaced.
    """
    with _stating(path):
        suffix = _suffix(path)
        if suffix in _CODECS:
            _CODECS[suffix].encoder()
        for target in _paths(path, videos):
            _check_parent(target)
            if suffix == _FOLDER:
                _check_folder(target)
            else:
                _check_file(target)


def numbered(path: Path | str, index: int, count: int) -> Path:
    """Name the place of video `index` of `count`: ``out-0.mp4`` for several, ``out/0`` in a folder, one ``.npy``."""
    suffix, path = _suffix(path), Path(path)
    if count == 1 or suffix == ".npy":
        return path
    return path / str(index) if suffix == _FOLDER else path.with_stem(f"{path.stem}-{index}")


def contact_sheet(frames: NDArray[np.float32], columns: int) -> Image.Image:
    """Lay evenly chosen frames, the first and the last among them, side by side with white gaps.

    Args:
        frames: (n, height, width, 3), RGB in [0, 1].
        columns: How many frames to show; all of them when there are fewer.
    """
    chosen = np.linspace(0, len(frames) - 1, min(columns, len(frames))).round().astype(int)
    _, height, width, _ = frames.shape
    gap = max(width // 32, 1)
    sheet = Image.new("RGB", (len(chosen) * (width + gap) - gap, height), "white")
    for column, pixels in enumerate(_bytes(frames[chosen])):
        sheet.paste(Image.fromarray(pixels), (column * (width + gap), 0))
    return sheet


class _Encoder(Protocol):
    """Makes one file or folder out of frames."""

    def add(self, frames: NDArray[np.float32]) -> None:
        """Append frames, (n, H, W, 3) in [0, 1]."""

    def finish(self) -> None:
        """Complete and close the file."""

    def close(self) -> None:
        """Close the file as it is, to be thrown away."""


def _bt709(graph: Graph, source: FilterContext) -> FilterContext:
    """RGB to 8-bit 4:2:0 in limited range, by the matrix that players assume from 720 lines up, and tagged as such."""
    scale, pixels = graph.add("scale", "out_color_matrix=bt709:out_range=tv"), graph.add("format", "yuv420p")
    source.link_to(scale)
    scale.link_to(pixels)
    return pixels


def _one_palette(graph: Graph, source: FilterContext) -> FilterContext:
    """RGB to 256 colours for the whole video; so all of its frames wait here, as bytes, until the last one is in.

    On smooth colour about 1 dB closer than Pillow's median cut, without the flicker of error diffusion.
    """
    split, palettegen = graph.add("split"), graph.add("palettegen")
    paletteuse = graph.add("paletteuse", "dither=bayer:bayer_scale=4")
    source.link_to(split)
    split.link_to(paletteuse, 0, 0)
    split.link_to(palettegen, 1, 0)
    palettegen.link_to(paletteuse, 0, 1)
    return paletteuse


@dataclass(frozen=True)
class _Codec:
    """A container with its options, its pixels, and the encoders that may fill it with theirs, best first."""

    container: str
    options: dict[str, str]
    pixels: str
    filters: Callable[[Graph, FilterContext], FilterContext]
    encoders: dict[str, dict[str, str]]

    def encoder(self) -> str:
        """Name the first encoder that this build of PyAV has."""
        name = next((name for name in self.encoders if name in av.codecs_available), None)
        if name is None:
            raise OutputError(
                f"this build of PyAV cannot write {self.container}: it lacks {' and '.join(self.encoders)}",
                fix="install av from PyPI, or write a .npy or a folder",
            )
        return name


# CRF 17 is visually lossless for x264; OpenH264 knows no CRF, only bounds on the quantizer.
_H264 = {"libx264": {"crf": "17"}, "libopenh264": {"qmin": "10", "qmax": "20"}}
_VP9 = {"libvpx-vp9": {"crf": "20", "deadline": "good", "cpu-used": "4"}}
_CODECS = {
    ".mp4": _Codec("mp4", {"movflags": "faststart"}, "yuv420p", _bt709, _H264),
    ".webm": _Codec("webm", {}, "yuv420p", _bt709, _VP9),
    ".gif": _Codec("gif", {"loop": "0"}, "pal8", _one_palette, {"gif": {}}),
}


def _stream(container: OutputContainer, codec: _Codec, video: VideoFormat) -> VideoStream:
    """Add the stream to a container, on one thread, since x264's bytes depend on how many there are."""
    name = codec.encoder()
    stream = container.add_stream(name, video.fps, options=codec.encoders[name])
    assert isinstance(stream, VideoStream)
    stream.width, stream.height, stream.pix_fmt = video.width, video.height, codec.pixels
    context = stream.codec_context
    context.thread_count = 1
    if codec.filters is _bt709:
        context.colorspace = context.color_primaries = context.color_trc = Colorspace.ITU709
        context.color_range = ColorRange.MPEG
    return stream


class _CompressedVideo:
    """Frames through a filter graph and an encoder into a container."""

    def __init__(self, codec: _Codec, target: Path, video: VideoFormat) -> None:
        self._fps, self._count = video.fps, 0
        # An absolute path, which FFmpeg cannot take for a protocol; bitexact, which leaves out random identifiers.
        options = {"fflags": "+bitexact", **codec.options}
        self._container = av.open(str(target), "w", format=codec.container, container_options=options)
        self._stream = _stream(self._container, codec, video)
        self._graph = Graph()  # kept, since its nodes refer to it weakly
        source = f"video_size={video.width}x{video.height}:pix_fmt=rgb24:time_base=1/{video.fps}:pixel_aspect=1/1"
        self._source, self._sink = self._graph.add("buffer", source), self._graph.add("buffersink")
        codec.filters(self._graph, self._source).link_to(self._sink)
        self._graph.configure()

    def add(self, frames: NDArray[np.float32]) -> None:
        for pixels in _bytes(frames):
            frame = VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = self._count, Fraction(1, self._fps)
            self._count += 1
            self._push(frame)

    def finish(self) -> None:
        self._push(None)
        self._container.mux(self._stream.encode())
        self.close()

    def close(self) -> None:
        self._container.close()

    def _push(self, frame: VideoFrame | None) -> None:
        """Give one frame, or None for the end, and encode what comes out."""
        self._source.push(frame)
        # "Try again" and "end of file" are how a sink says that it has no more.
        with suppress(BlockingIOError, EOFError):
            while True:
                filtered = self._sink.pull()
                assert isinstance(filtered, VideoFrame)
                self._container.mux(self._stream.encode(filtered))


class _Npy:
    """One float32 array, (frames, H, W, 3), or (videos, frames, H, W, 3) for several."""

    def __init__(self, target: Path, video: VideoFormat) -> None:
        videos = (video.videos,) if video.videos > 1 else ()
        shape = (*videos, video.frames, video.height, video.width, 3)
        self._file = target.open("wb")
        # Written, not mapped: a disk that runs full must raise an error, and a map would kill the process.
        np.lib.format.write_array_header_1_0(self._file, {"descr": "<f4", "fortran_order": False, "shape": shape})

    def add(self, frames: NDArray[np.float32]) -> None:
        self._file.write(np.ascontiguousarray(frames, "<f4").data)

    def finish(self) -> None:
        self.close()

    def close(self) -> None:
        self._file.close()


class _PngFolder:
    """A folder of 0000.png, 0001.png, ..."""

    def __init__(self, target: Path, video: VideoFormat) -> None:
        target.mkdir()
        self._folder, self._count = target, 0

    def add(self, frames: NDArray[np.float32]) -> None:
        for pixels in _bytes(frames):
            Image.fromarray(pixels).save(self._folder / f"{self._count:04d}.png")
            self._count += 1

    def finish(self) -> None:
        pass

    def close(self) -> None:
        pass


ENCODERS: dict[str, Callable[[Path, VideoFormat], _Encoder]] = {
    **{suffix: partial(_CompressedVideo, codec) for suffix, codec in _CODECS.items()},
    ".npy": _Npy,
    _FOLDER: _PngFolder,
}


def _suffix(path: Path | str) -> str:
    """Tell what a path names: a key of ENCODERS."""
    if str(path).endswith("/") or Path(path).is_dir():
        return _FOLDER
    suffix = Path(path).suffix.lower()
    if suffix not in ENCODERS:
        known = ", ".join(filter(None, ENCODERS))
        raise OutputError(f"{path}: nothing here writes {suffix}", fix=f"end it in {known}, or in / for a folder")
    return suffix


def _paths(path: Path | str, videos: int) -> tuple[Path, ...]:
    return tuple(dict.fromkeys(numbered(path, index, videos) for index in range(videos)))


def _resolved(path: Path) -> Path:
    """Follow links: what they point to is replaced, not they. Never raises, unlike Path.resolve on a loop."""
    return Path(os.path.realpath(path))


def _temporary(target: Path) -> Path:
    """Name a temporary beside `target`, on the same file system."""
    return target.with_name(f".cvx-deploy-{secrets.token_hex(8)}.partial")


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


def _publish(temporary: Path, target: Path) -> None:
    """Rename a whole video onto its place; an earlier folder of frames stands aside until the new one is there."""
    if not (temporary.is_dir() and target.exists()):
        temporary.replace(target)
        return
    _check_folder(target)  # hours may have passed
    earlier = _temporary(target)
    try:
        target.rename(earlier)
        temporary.rename(target)
    except BaseException:
        if earlier.exists() and not target.exists():
            earlier.rename(target)
        raise
    _remove(earlier)


def _remove(temporary: Path) -> None:
    if temporary.is_dir():
        shutil.rmtree(temporary)
    else:
        temporary.unlink(missing_ok=True)


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


def _bytes(frames: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Round [0, 1] to 0..255 as ``VaeImageProcessor.numpy_to_pil`` does."""
    return (frames * 255).round().astype(np.uint8)
