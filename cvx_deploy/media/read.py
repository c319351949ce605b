"""Images and videos in: local files to pixels, exactly as diffusers prepares them for the VAE.

The numbers equal ``diffusers.utils.load_image`` followed by ``VideoProcessor.preprocess`` (and ``preprocess_video``):
EXIF orientation, RGB, Lanczos, [-1, 1]. What is opened is untrusted: only the listed formats are tried, no frame may
have more pixels than Pillow's own limit, and a file can never make another file or address be opened.
"""

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import av
import numpy as np
from av.container import InputContainer
from av.stream import Disposition
from av.video.stream import VideoStream
from numpy.typing import NDArray
from PIL import Image, ImageSequence, UnidentifiedImageError

from cvx_deploy.errors import MediaError
from cvx_deploy.media.rgb import rgb_of_frame, rgb_of_image
from cvx_deploy.reading import reading
from cvx_deploy.shape import Shape

# Not everything Pillow knows: its EPS reader starts Ghostscript, and libtiff has a long record of holes.
_IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
# Demuxers that read one file and nothing else; hls, dash, concat, image2 and sdp would open what the file names.
_VIDEO_DEMUXERS = "mov,matroska,avi,mpegts,mpeg,flv,ogg,asf"
_FRAME_SUFFIXES = {".png", ".jpg", ".jpeg"}
# Pillow's limit before it warns: a quarter of a gigabyte of RGB.
MAX_PIXELS = 1024**3 // 4 // 3
# A path squeezes the "//" of a URL into one slash.
_URL = re.compile(r"[a-z][a-z0-9+.-]+:/", re.IGNORECASE)


@dataclass(frozen=True)
class DecodedVideo:
    """The first frames of a video.

    Attributes:
        pixels: (B, C, F, H, W) with B = 1 and C = 3, RGB in [-1, 1].
        total_frames: How many frames the source has; None where its container does not say.
    """

    pixels: NDArray[np.float32]
    total_frames: int | None


def load_image(path: Path, height: int, width: int) -> NDArray[np.float32]:
    """Read one image (of an animation, the first frame) and resize it without keeping its aspect ratio.

    Args:
        path: A local file; URLs are not fetched.
        height: Pixels, a multiple of 8 (as `width`; diffusers would round others down).
        width: Pixels.

    Returns:
        (B, C, F, H, W) with B = F = 1 and C = 3, RGB in [-1, 1].

    Raises:
        MediaError: The file is missing, empty, truncated, too large, or not an image.
    """
    return pixels_of(_rgb_from_file(path), height, width)[None, :, None]


def check_pixels(path: Path, most: int) -> None:
    """Raise MediaError for an image of more than so many pixels, by what its header says; none is decoded."""
    with _stating(path, "an image"), _opened(path) as file, Image.open(file, formats=_IMAGE_FORMATS) as image:
        if image.width * image.height > most:
            raise MediaError(f"{path} has {image.width}x{image.height} pixels", fix=f"send {most:,} pixels at most")


def load_video(path: Path, frames: int, height: int, width: int) -> DecodedVideo:
    """Read the first `frames` frames of a video file, an animation or a folder of images, and no more.

    Args:
        path: A local video file, an animated GIF, WebP or PNG, or a folder of PNG or JPEG frames in natural order.
        frames: How many frames to read.
        height: Pixels, a multiple of 8, as `width`; each frame is resized by itself.
        width: Pixels.

    Raises:
        MediaError: There are fewer frames, or the file is missing, empty, truncated, too large, or not a video.
    """
    pixels = np.empty((1, 3, frames, height, width), np.float32)
    count = 0
    with _stating(path, "a video"), _frames(path) as (total, images):
        for count, image in enumerate(islice(images, frames), start=1):
            pixels[0, :, count - 1] = pixels_of(image, height, width)
    if count < frames:
        raise MediaError(
            f"{path} has {count} frame{'s' * (count != 1)} that can be read, and {frames} are needed",
            fix="give a longer video, or one that is not cut short",
        )
    return DecodedVideo(pixels, total if total is None or total >= frames else None)


def shape_of_video(path: Path) -> Shape:
    """Return the size of a video, and how many frames of it can be read: every one is decoded.

    Raises:
        MediaError: It cannot be read, or holds no frame.
    """
    with _stating(path, "a video"), _frames(path) as (_, frames):
        sizes = [(frame.height, frame.width) for frame in frames]
    if not sizes:
        raise MediaError(f"{path} has no frame that can be read", fix="give a video that is not cut short")
    return Shape(len(sizes), *sizes[0])


def frames_of(path: Path, height: int, width: int) -> Iterator[NDArray[np.uint8]]:
    """Yield the frames of a video one by one, (height, width, 3) each, resized where they are of another size.

    Raises:
        MediaError: It cannot be read.
    """
    with _stating(path, "a video"), _frames(path) as (_, frames):
        for frame in frames:
            fits = (frame.height, frame.width) == (height, width)
            yield np.asarray(frame if fits else frame.resize((width, height), Image.Resampling.LANCZOS))


def pixels_of(image: Image.Image, height: int, width: int) -> NDArray[np.float32]:
    """Resize one RGB image and scale it: (C, H, W) in [-1, 1], as ``VaeImageProcessor.preprocess`` does."""
    resized = image.resize((width, height), Image.Resampling.LANCZOS)
    unit = np.asarray(resized).astype(np.float32) / 255.0
    return 2.0 * unit.transpose(2, 0, 1) - 1.0


def _rgb(image: Image.Image) -> Image.Image:
    """Check the size before the first pixel is decoded, then turn the image upright and into RGB."""
    _check_size(image.width, image.height)
    return rgb_of_image(image)


def _rgb_from_file(path: Path) -> Image.Image:
    with _stating(path, "an image"), _opened(path) as file, Image.open(file, formats=_IMAGE_FORMATS) as image:
        return _rgb(image)


@contextmanager
def _frames(path: Path) -> Iterator[tuple[int | None, Iterator[Image.Image]]]:
    """Open any kind of video; yields its stated frame count and its frames as RGB images, decoded when asked for."""
    if path.is_dir():
        files = _frame_files(path)
        yield len(files), map(_rgb_from_file, files)
        return
    with _opened(path) as file:
        animation = _animation(file)
        if animation is not None:
            with animation:
                yield getattr(animation, "n_frames", 1), map(_rgb, ImageSequence.Iterator(animation))
            return
        file.seek(0)
        # Through a file object no protocol is ever looked up, and the whitelist keeps out what opens further files.
        with av.open(file, mode="r", container_options={"format_whitelist": _VIDEO_DEMUXERS}) as container:
            stream = _video_stream(path, container)
            yield stream.frames or None, _decoded(container, stream)


def _animation(file: BinaryIO) -> Image.Image | None:
    """Open what Pillow reads, by content and not by name; None for everything else."""
    try:
        return Image.open(file, formats=_IMAGE_FORMATS)
    except UnidentifiedImageError:
        return None


def _video_stream(path: Path, container: InputContainer) -> VideoStream:
    """Find the first stream that is a video and not cover art, and bound what its decoder may allocate."""
    streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if not streams:
        raise MediaError(f"{path} has no video stream", fix="give a file with a video in it")
    stream = streams[0]
    if stream.codec_context is None:
        raise MediaError(f"{path} is in a codec that cannot be decoded here", fix="convert it to H.264 in mp4")
    _check_size(stream.codec_context.width, stream.codec_context.height)
    # A stream may change its size on the way. The decoder counts its padding as well, hence the factor.
    stream.codec_context.options = {"max_pixels": str(2 * MAX_PIXELS)}
    return stream


def _decoded(container: InputContainer, stream: VideoStream) -> Iterator[Image.Image]:
    for frame in container.decode(stream):
        _check_size(frame.width, frame.height)
        yield rgb_of_frame(frame)


def _frame_files(folder: Path) -> list[Path]:
    """List a folder's frames in natural order: ``frame2.png`` before ``frame10.png``; hidden files do not count."""
    files = [f for f in folder.iterdir() if f.suffix.lower() in _FRAME_SUFFIXES and not f.name.startswith(".")]
    if not files:
        raise MediaError(f"{folder} holds no PNG or JPEG frames", fix="give a video file, or a folder of images")
    return sorted(files, key=lambda file: (_natural(file.name), file.name))


def _natural(name: str) -> list[tuple[str, int]]:
    """Split a name into numbers and the text before each, so that numbers sort by value."""
    return [(text, int(digits or -1)) for text, digits in re.findall(r"(\D*)(\d*)", name)]


def _opened(path: Path) -> BinaryIO:
    """Open a local, regular, non-empty file; the caller closes it."""
    if not path.exists():
        if _URL.match(str(path)):
            raise MediaError(f"{path}: URLs are not fetched", fix="download it and give the local file")
        raise MediaError(f"{path}: no such file", fix="check the path")
    if not path.is_file():
        what = "a folder" if path.is_dir() else "a device or pipe"
        raise MediaError(f"{path} is {what}, not a file", fix="give the path of a file")
    if path.stat().st_size == 0:
        raise MediaError(f"{path} is empty", fix="download or make it again")
    return path.open("rb")


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise Image.DecompressionBombError(f"{width}x{height}")


@contextmanager
def _stating(path: Path, kind: str) -> Iterator[None]:
    """Turn what the decoders raise on unreadable, oversized or damaged files into one stated failure."""
    with reading(path, MediaError, fix=_fix(kind)), warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            yield
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise MediaError(
                f"{path} has frames of more than {MAX_PIXELS} pixels", fix="scale it down to the size of the video"
            ) from error
        except (av.FFmpegError, UnidentifiedImageError) as error:
            raise MediaError(f"{path} is damaged or not {kind}", fix=_fix(kind)) from error


def _fix(kind: str) -> str:
    formats = ", ".join(_IMAGE_FORMATS) if kind == "an image" else "mp4, mov, webm, mkv, avi, GIF or animated WebP"
    return f"check that the file plays or opens elsewhere, and give one of {formats}"
