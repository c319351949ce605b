"""How frames become a file: one encoder for each suffix, all with the same three methods.

With one build of PyAV the same frames give the same bytes each time, on any number of cores.
"""

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Protocol

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

from cvx_deploy.errors import OutputError

FOLDER = ""  # the key of a folder of PNG frames among the suffixes


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


class Encoder(Protocol):
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

    On smooth colour about 1 dB closer than Pillow's median cut, without the flicker of error diffusion. Six bits a
    channel go in: millions of colours would keep palettegen busy for minutes, to gain less than 0.1 dB.
    """
    coarse = "round(round(val*63/255)*255/63)"
    lut = graph.add("lutrgb", f"r={coarse}:g={coarse}:b={coarse}")
    split, palettegen = graph.add("split"), graph.add("palettegen")
    paletteuse = graph.add("paletteuse", "dither=bayer:bayer_scale=4")
    source.link_to(lut)
    lut.link_to(split)
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
# Without cpu-independent x264 takes short cuts in its `mbtree` that give other bytes from one time to the next.
_H264 = {"libx264": {"crf": "17", "x264-params": "cpu-independent=1"}, "libopenh264": {"qmin": "10", "qmax": "20"}}
_VP9 = {"libvpx-vp9": {"crf": "20", "deadline": "good", "cpu-used": "4"}}
CODECS = {
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
        self._fps, self._streams = video.fps, codec.filters is not _one_palette
        self._pushed = self._pulled = 0
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
        for pixels in as_bytes(frames):
            frame = VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = self._pushed, Fraction(1, self._fps)
            self._source.push(frame)
            self._pushed += 1
            if self._streams:
                self._encode_next()

    def finish(self) -> None:
        self._source.push(None)
        while self._pulled < self._pushed:
            self._encode_next()
        self._container.mux(self._stream.encode())
        self.close()

    def close(self) -> None:
        self._container.close()

    def _encode_next(self) -> None:
        """Take one frame out of the filters; asking for one too many would raise, and PyAV then loses interrupts."""
        frame = self._sink.pull()
        assert isinstance(frame, VideoFrame)
        self._pulled += 1
        self._container.mux(self._stream.encode(frame))


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
        target.mkdir(exist_ok=True)
        self._folder, self._count = target, 0

    def add(self, frames: NDArray[np.float32]) -> None:
        for pixels in as_bytes(frames):
            Image.fromarray(pixels).save(self._folder / f"{self._count:04d}.png")
            self._count += 1

    def finish(self) -> None:
        pass

    def close(self) -> None:
        pass


ENCODERS: dict[str, Callable[[Path, VideoFormat], Encoder]] = {
    **{suffix: partial(_CompressedVideo, codec) for suffix, codec in CODECS.items()},
    ".npy": _Npy,
    FOLDER: _PngFolder,
}


def as_bytes(frames: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Round [0, 1] to 0..255 as ``VaeImageProcessor.numpy_to_pil`` does."""
    return (frames * 255).round().astype(np.uint8)
