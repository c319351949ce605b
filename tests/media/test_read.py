"""What is read from files equals what diffusers reads, and whatever cannot be read is refused in one line."""

import os
import struct
import zlib
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from pathlib import Path

import av
import numpy as np
import pytest
from av.stream import Disposition
from diffusers.utils import load_image as diffusers_load_image
from diffusers.video_processor import VideoProcessor
from numpy.typing import NDArray
from PIL import Image

from cvx_deploy.errors import MediaError
from cvx_deploy.media import read as media
from cvx_deploy.media.encoders import VideoFormat
from cvx_deploy.media.read import load_image, load_video
from cvx_deploy.media.rgb import displayed
from cvx_deploy.media.write import open_writer

TOLERANCE = 1e-6  # both divide the same bytes by 255 in float32
PROCESSOR = VideoProcessor(vae_scale_factor=8)
HEIGHT, WIDTH = 32, 48  # what is asked for; what is on disk is larger
FRAMES = 9


def agree(ours: NDArray[np.float32], theirs: NDArray[np.float32]) -> bool:
    return ours.shape == theirs.shape and float(np.abs(ours - theirs).max()) <= TOLERANCE


def picture(index: int = 0, height: int = 72, width: int = 100) -> Image.Image:
    """Noise over a gradient: nothing about it is symmetric."""
    noise = np.random.default_rng(index).integers(0, 128, (height, width, 3))
    return Image.fromarray((noise + np.linspace(0, 127, width).astype(int)[:, None]).astype(np.uint8))


def write_video(path: Path, frames: int = FRAMES) -> Path:
    pixels = np.stack([np.asarray(picture(i, 64, 96), np.float32) / np.float32(255) for i in range(frames)])
    with open_writer(path, VideoFormat(frames, 64, 96, 8)) as writer:
        writer.write(pixels)
    return path


def decoded(path: Path) -> list[Image.Image]:
    with av.open(str(path)) as container:
        return [frame.to_image() for frame in container.decode(video=0)]


def diffusers_image(image: Image.Image) -> NDArray[np.float32]:
    return PROCESSOR.preprocess(diffusers_load_image(image), HEIGHT, WIDTH).numpy()[:, :, None]


def diffusers_video(frames: list[Image.Image]) -> NDArray[np.float32]:
    return PROCESSOR.preprocess_video([f.convert("RGB") for f in frames], height=HEIGHT, width=WIDTH).numpy()


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


MODES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "rgb.png": lambda im: im,
    "rgb.jpg": lambda im: im,
    "rgb.bmp": lambda im: im,
    "rgb.webp": lambda im: im,
    "grey.png": lambda im: im.convert("L"),
    "bilevel.png": lambda im: im.convert("1"),
    "palette.png": lambda im: im.quantize(32),
    "palette.gif": lambda im: im.quantize(32),
    "alpha.png": lambda im: Image.merge("RGBA", (*im.split(), im.convert("L"))),
    "cmyk.jpg": lambda im: im.convert("CMYK"),
}


@pytest.mark.parametrize("name", MODES)
def test_an_image_of_any_mode_equals_diffusers(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    MODES[name](picture()).save(path)
    ours = load_image(path, HEIGHT, WIDTH)
    assert ours.shape == (1, 3, 1, HEIGHT, WIDTH)
    assert ours.dtype == np.float32
    assert agree(ours, diffusers_image(Image.open(path)))


def test_grey_of_16_bits_is_the_same_picture_as_its_8_bits(tmp_path: Path) -> None:
    grey = picture().convert("L")
    Image.fromarray(np.asarray(grey).astype(np.uint16) * 257).save(tmp_path / "grey16.png")
    assert Image.open(tmp_path / "grey16.png").mode == "I;16"
    ours = load_image(tmp_path / "grey16.png", HEIGHT, WIDTH)
    assert agree(ours, diffusers_image(grey))
    assert not agree(ours, diffusers_image(Image.open(tmp_path / "grey16.png")))  # clipped: nearly white


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_photo_equals_diffusers_upright(tmp_path: Path, orientation: int) -> None:
    path = tmp_path / "photo.jpg"
    picture().save(path, exif=exif(orientation))
    assert agree(load_image(path, HEIGHT, WIDTH), diffusers_image(Image.open(path)))


def test_the_comparison_fails_when_one_pixel_or_the_orientation_differs(tmp_path: Path) -> None:
    path, image = tmp_path / "image.png", picture()
    image.save(path)
    theirs = diffusers_image(image)
    assert agree(load_image(path, HEIGHT, WIDTH), theirs)
    image.save(path, exif=exif(3))
    assert not agree(load_image(path, HEIGHT, WIDTH), theirs)
    image.putpixel((50, 36), (0, 255, 0))
    image.save(path)
    assert not agree(load_image(path, HEIGHT, WIDTH), theirs)


@pytest.mark.parametrize("suffix", [".mp4", ".webm"])
@pytest.mark.parametrize("frames", [1, 5, FRAMES])
def test_the_first_frames_of_a_video_equal_diffusers(tmp_path: Path, suffix: str, frames: int) -> None:
    path = write_video(tmp_path / f"clip{suffix}")
    clip = load_video(path, frames, HEIGHT, WIDTH)
    assert clip.pixels.shape == (1, 3, frames, HEIGHT, WIDTH)
    assert clip.pixels.dtype == np.float32
    assert agree(clip.pixels, diffusers_video(decoded(path)[:frames]))


def test_the_comparison_fails_when_two_frames_change_places(tmp_path: Path) -> None:
    path = write_video(tmp_path / "clip.mp4")
    theirs = decoded(path)
    theirs[3], theirs[4] = theirs[4], theirs[3]
    assert not agree(load_video(path, FRAMES, HEIGHT, WIDTH).pixels, diffusers_video(theirs))


def test_the_total_is_told_where_the_container_tells_it(tmp_path: Path) -> None:
    assert load_video(write_video(tmp_path / "clip.mp4"), 4, HEIGHT, WIDTH).total_frames == FRAMES
    assert load_video(write_video(tmp_path / "clip.gif"), 4, HEIGHT, WIDTH).total_frames == FRAMES
    assert load_video(write_video(tmp_path / "clip.webm"), 4, HEIGHT, WIDTH).total_frames is None


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png"])
def test_an_animation_equals_diffusers_whatever_its_name(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"animation{suffix}"
    first, *rest = (picture(i) for i in range(4))
    first.save(path, save_all=True, append_images=rest, duration=100)
    theirs = []
    with Image.open(path) as image:
        for index in range(4):
            image.seek(index)
            theirs.append(image.convert("RGB"))
    assert agree(load_video(path, 4, HEIGHT, WIDTH).pixels, diffusers_video(theirs))
    renamed = path.rename(tmp_path / "animation.mp4")
    assert agree(load_video(renamed, 3, HEIGHT, WIDTH).pixels, diffusers_video(theirs[:3]))


def test_a_folder_is_read_in_natural_order_and_each_frame_resized(tmp_path: Path) -> None:
    names = ["frame1.png", "frame2.jpg", "frame10.JPEG"]
    for index, name in enumerate(names):
        picture(index, height=60 + 20 * index).save(tmp_path / name)
    (tmp_path / ".frame0.png").write_bytes(b"what some systems put beside every file")
    (tmp_path / "notes.txt").write_text("not a frame")
    clip = load_video(tmp_path, 3, HEIGHT, WIDTH)
    assert clip.total_frames == 3
    assert agree(clip.pixels, diffusers_video([Image.open(tmp_path / name) for name in names]))


def test_natural_order_compares_text_before_numbers() -> None:
    names = ["b2.png", "a10.png", "a2.png", "2.png", "10.png", "a2b.png"]
    assert sorted(names, key=media._natural) == ["2.png", "10.png", "a2.png", "a2b.png", "a10.png", "b2.png"]


def test_a_video_filmed_upright_is_turned_upright(tmp_path: Path) -> None:
    path = write_video(tmp_path / "phone.mp4", frames=2)
    clockwise = [frame.transpose(Image.Transpose.ROTATE_270) for frame in decoded(path)]
    data = bytearray(path.read_bytes())
    matrix = data.index(b"tkhd") + 44
    # (x, y) -> (-y, x), as phones write it: what was on the right is at the bottom.
    data[matrix : matrix + 36] = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    assert agree(load_video(path, 2, HEIGHT, WIDTH).pixels, diffusers_video(clockwise))


TRANSPOSED = Image.Transpose
MATRICES = {
    "as it is": ((1, 0, 0, 1), None),
    "mirrored": ((-1, 0, 0, 1), TRANSPOSED.FLIP_LEFT_RIGHT),
    "upside down": ((1, 0, 0, -1), TRANSPOSED.FLIP_TOP_BOTTOM),
    "half a turn": ((-1, 0, 0, -1), TRANSPOSED.ROTATE_180),
    "clockwise": ((0, 1, -1, 0), TRANSPOSED.ROTATE_270),
    "anticlockwise": ((0, -1, 1, 0), TRANSPOSED.ROTATE_90),
    "x is y": ((0, 1, 1, 0), TRANSPOSED.TRANSPOSE),
    "x is -y": ((0, -1, -1, 0), TRANSPOSED.TRANSVERSE),
}


@pytest.mark.parametrize("name", MATRICES)
def test_a_display_matrix_turns_and_mirrors(tmp_path: Path, name: str) -> None:
    (a, b, c, d), operation = MATRICES[name]
    path = write_video(tmp_path / "phone.mp4", frames=2)
    shown = [frame if operation is None else frame.transpose(operation) for frame in decoded(path)]
    data = bytearray(path.read_bytes())
    matrix = data.index(b"tkhd") + 44
    numbers = (a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    data[matrix : matrix + 36] = struct.pack(">9i", *numbers)
    path.write_bytes(data)
    ours = load_video(path, 2, HEIGHT, WIDTH).pixels
    assert agree(ours, diffusers_video(shown))
    assert not agree(ours, diffusers_video([frame.transpose(TRANSPOSED.ROTATE_90) for frame in shown]))


def test_a_display_matrix_that_makes_no_sense_changes_nothing() -> None:
    pixels = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    for matrix in (b"", b"\0" * 35, b"\0" * 36):
        np.testing.assert_array_equal(displayed(pixels, matrix), pixels)


def test_only_the_frames_asked_for_are_decoded(tmp_path: Path) -> None:
    path = write_video(tmp_path / "clip.webm", frames=40)
    data = bytearray(path.read_bytes())
    data[-2000:] = bytes(2000)
    path.write_bytes(data)
    assert load_video(path, 3, HEIGHT, WIDTH).pixels.shape[2] == 3
    for index in range(3):
        picture(index).save(tmp_path / f"{index}.png")
    (tmp_path / "3.png").write_bytes(b"never opened")
    assert load_video(tmp_path, 3, HEIGHT, WIDTH).total_frames == 4


def refusal(load: Callable[[], object]) -> str:
    """The one line that a file is refused with."""
    with pytest.raises(MediaError) as caught:
        load()
    message = str(caught.value)
    assert "\n" not in message
    assert ". fix: " in message
    return message


@pytest.mark.parametrize("make", ["clip.mp4", "clip.webm", "clip.gif", "clip"])
def test_too_few_frames_are_counted(tmp_path: Path, make: str) -> None:
    path = write_video(tmp_path / make)
    message = refusal(lambda: load_video(path, 49, HEIGHT, WIDTH))
    assert "9 frames" in message
    assert "49 are needed" in message
    assert "--frames" not in message  # a bundle for so few frames need not be one that can be made


def test_an_image_is_a_video_of_one_frame(tmp_path: Path) -> None:
    picture().save(tmp_path / "image.jpg")
    assert "1 frame " in refusal(lambda: load_video(tmp_path / "image.jpg", 9, HEIGHT, WIDTH))


LOADERS: dict[str, Callable[[Path], object]] = {
    "image": lambda path: load_image(path, HEIGHT, WIDTH),
    "video": lambda path: load_video(path, FRAMES, HEIGHT, WIDTH),
}
both = pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)


@both
def test_a_missing_file_is_named(tmp_path: Path, load: Callable[[Path], object]) -> None:
    assert "gone.png: no such file" in refusal(lambda: load(tmp_path / "gone.png"))
    assert "cannot be read" in refusal(lambda: load(tmp_path / ("x" * 300)))


@both
@pytest.mark.parametrize("url", ["https://example.com/a.png", "http://example.com/a.mp4", "file:///etc/passwd"])
def test_urls_are_not_fetched(load: Callable[[Path], object], url: str) -> None:
    assert "URLs are not fetched" in refusal(lambda: load(Path(url)))


@both
def test_protocols_are_only_names(load: Callable[[Path], object], tmp_path: Path) -> None:
    write_video(tmp_path / "clip.mp4")
    for name in ("concat:clip.mp4", "subfile,,start,0,end,0,,:clip.mp4", "clip%d.mp4"):
        assert "no such file" in refusal(partial(load, tmp_path / name))


@both
def test_an_empty_file_is_refused(tmp_path: Path, load: Callable[[Path], object]) -> None:
    (tmp_path / "empty").touch()
    assert "is empty" in refusal(lambda: load(tmp_path / "empty"))


@both
def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path, load: Callable[[Path], object]) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert "not a file" in refusal(lambda: load(tmp_path / "pipe"))


@both
def test_garbage_and_text_are_refused(tmp_path: Path, load: Callable[[Path], object]) -> None:
    path = tmp_path / "file.mp4"
    for data in (
        np.random.default_rng(0).bytes(5000),
        b"hello\n" * 500,
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9",
    ):
        path.write_bytes(data)
        assert "is damaged or not a" in refusal(lambda: load(path))


@both
def test_an_unreadable_file_is_refused(
    tmp_path: Path, load: Callable[[Path], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    picture().save(tmp_path / "image.png")

    def denied(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)
    assert "cannot be read: Permission denied" in refusal(lambda: load(tmp_path / "image.png"))


def test_a_folder_is_no_image_and_a_folder_without_images_no_video(tmp_path: Path) -> None:
    assert "is a folder" in refusal(lambda: load_image(tmp_path, HEIGHT, WIDTH))
    (tmp_path / "notes.txt").write_text("no frames")
    assert "holds no PNG or JPEG" in refusal(lambda: load_video(tmp_path, 1, HEIGHT, WIDTH))


def test_a_video_is_no_image(tmp_path: Path) -> None:
    path = write_video(tmp_path / "clip.mp4")
    assert "not an image" in refusal(lambda: load_image(path, HEIGHT, WIDTH))


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".gif", ".bmp"])
def test_a_truncated_image_is_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"image{suffix}"
    picture().save(path)
    whole = path.read_bytes()
    for share in (0.02, 0.5, 0.9):
        path.write_bytes(whole[: int(len(whole) * share)])
        assert "is damaged" in refusal(lambda: load_image(path, HEIGHT, WIDTH))


@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".gif"])
def test_a_truncated_video_is_refused(tmp_path: Path, suffix: str) -> None:
    path = write_video(tmp_path / f"clip{suffix}")
    whole = path.read_bytes()
    for share in (0.001, 0.02, 0.5, 0.95):
        path.write_bytes(whole[: int(len(whole) * share) + 1])
        message = refusal(lambda: load_video(path, FRAMES, HEIGHT, WIDTH))
        assert any(reason in message for reason in ("is damaged", "cut short", "no video stream"))


def test_a_damaged_frame_in_a_folder_is_named(tmp_path: Path) -> None:
    for index in range(3):
        picture(index).save(tmp_path / f"{index}.png")
    (tmp_path / "1.png").write_bytes((tmp_path / "1.png").read_bytes()[:500])
    assert "1.png is damaged" in refusal(lambda: load_video(tmp_path, 3, HEIGHT, WIDTH))


@pytest.mark.parametrize("cover", [False, True])
def test_sound_is_no_video_with_or_without_a_cover_picture(tmp_path: Path, cover: bool) -> None:
    path = tmp_path / "sound.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        if cover:
            art = container.add_stream("mjpeg", rate=1, width=96, height=64, pix_fmt="yuvj420p")
            art.disposition = Disposition.attached_pic
            frame = av.VideoFrame.from_image(picture(0, 64, 96)).reformat(format="yuvj420p")
            container.mux(art.encode(frame))
        for index in range(4):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 16000, 1024 * index
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with av.open(str(path)) as container:
        assert len(container.streams.video) == cover
    assert "has no video stream" in refusal(lambda: load_video(path, 1, HEIGHT, WIDTH))


def test_a_codec_without_a_decoder_is_refused(tmp_path: Path) -> None:
    path = write_video(tmp_path / "clip.mp4")
    data = path.read_bytes()
    path.write_bytes(data[:40] + data[40:].replace(b"avc1", b"zzzz"))
    assert "cannot be decoded" in refusal(lambda: load_video(path, 1, HEIGHT, WIDTH))


def bomb(path: Path, side: int) -> Path:
    """A PNG of a hundred bytes that unpacks to side x side pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"0" * 9)))
    return path


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("side", [10_000, 20_000])  # Pillow only warns of the first
def test_a_decompression_bomb_is_refused(tmp_path: Path, side: int) -> None:
    path = bomb(tmp_path / "0.png", side)
    assert "more than 89478485 pixels" in refusal(lambda: load_image(path, HEIGHT, WIDTH))
    assert "more than 89478485 pixels" in refusal(lambda: load_video(path, 1, HEIGHT, WIDTH))
    assert "more than 89478485 pixels" in refusal(lambda: load_video(tmp_path, 1, HEIGHT, WIDTH))


@pytest.mark.parametrize("name", ["clip.mp4", "clip.webm", "clip.gif", "clip"])
def test_the_pixel_limit_holds_for_every_kind_of_video(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    path = write_video(tmp_path / name)
    monkeypatch.setattr(media, "MAX_PIXELS", 64 * 96 - 1)
    assert "more than 6143 pixels" in refusal(lambda: load_video(path, FRAMES, HEIGHT, WIDTH))


def write_stream(path: Path, frames: int, height: int, width: int) -> None:
    with av.open(str(path), "w", format="mpegts") as container:
        stream = container.add_stream("libx264", rate=8, width=width, height=height, pix_fmt="yuv420p")
        for index in range(frames):
            frame = av.VideoFrame.from_image(picture(index, height, width))
            frame.pts, frame.time_base = index, Fraction(1, 8)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


@pytest.mark.parametrize("width", [400, 800])  # by a little, and by far
def test_a_video_that_grows_on_the_way_is_held_to_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    write_stream(tmp_path / "small.ts", 2, 256, 320)
    write_stream(tmp_path / "large.ts", 2, 256, width)
    path = tmp_path / "grows.ts"
    path.write_bytes((tmp_path / "small.ts").read_bytes() + (tmp_path / "large.ts").read_bytes())
    assert agree(load_video(path, 4, HEIGHT, WIDTH).pixels, diffusers_video(decoded(path)))
    monkeypatch.setattr(media, "MAX_PIXELS", 256 * 320)
    load_video(tmp_path / "small.ts", 2, HEIGHT, WIDTH)
    message = refusal(lambda: load_video(path, 4, HEIGHT, WIDTH))
    assert "more than 81920 pixels" in message or "is damaged" in message


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("list.m3u8", "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nother.ts\n#EXT-X-ENDLIST\n"),
        ("list.txt", "ffconcat version 1.0\nfile other.ts\n"),
    ],
)
def test_a_playlist_cannot_open_another_file(tmp_path: Path, name: str, text: str) -> None:
    write_stream(tmp_path / "other.ts", 3, 64, 96)
    playlist = tmp_path / name
    playlist.write_text(text)
    assert len(decoded(playlist)) == 3  # FFmpeg by itself follows it
    assert "is damaged or not a video" in refusal(lambda: load_video(playlist, 1, HEIGHT, WIDTH))
    assert load_video(tmp_path / "other.ts", 1, HEIGHT, WIDTH).pixels.shape[2] == 1


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.filterwarnings("error")
def test_no_file_stays_open(tmp_path: Path) -> None:
    good = [write_video(tmp_path / name) for name in ("clip.mp4", "clip.gif", "clip")]
    picture().save(tmp_path / "image.png")
    (tmp_path / "bad.mp4").write_bytes(good[0].read_bytes()[:1000])
    before = open_files()
    for path in good:
        load_video(path, 2, HEIGHT, WIDTH)
        refusal(partial(load_video, path, 49, HEIGHT, WIDTH))
    load_image(tmp_path / "image.png", HEIGHT, WIDTH)
    refusal(lambda: load_image(tmp_path / "bad.mp4", HEIGHT, WIDTH))
    refusal(lambda: load_video(tmp_path / "bad.mp4", 2, HEIGHT, WIDTH))
    assert open_files() == before
