"""What is written can be read back, is the same however it was streamed, and appears whole or not at all."""

import os
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
from diffusers.image_processor import VaeImageProcessor
from numpy.typing import NDArray
from PIL import Image

from cvx_deploy import files
from cvx_deploy.errors import MediaError, OutputError, ShapeError
from cvx_deploy.media.encoders import VideoFormat
from cvx_deploy.media.write import check_writable, numbered, open_writer
from tests.command import spawn, wait_for

FRAMES, HEIGHT, WIDTH = 9, 48, 80
FORMAT = VideoFormat(FRAMES, HEIGHT, WIDTH, fps=8)
PSNR_FLOOR = 30.0  # dB: below it, the compression of a smooth clip is visible
PSNR_FLOOR_GIF = 24.0  # dB: 256 colours for a clip that shows thousands
NAMES = ["out.mp4", "out.webm", "out.gif", "out.npy", "out"]
every_format = pytest.mark.parametrize("name", NAMES)


def smooth(frames: int = FRAMES, height: int = HEIGHT, width: int = WIDTH) -> NDArray[np.float32]:
    """Three waves of colour that move in three directions, (F, H, W, 3) in [0, 1]."""
    t = np.arange(frames)[:, None, None] / frames
    y = np.arange(height)[None, :, None] / height
    x = np.arange(width)[None, None, :] / width
    waves = np.broadcast_arrays(np.sin(6.28 * (x + t)), np.cos(6.28 * (y - t)), np.sin(6.28 * (x + y) - 6.28 * t))
    return (0.5 + 0.45 * np.stack(waves, axis=-1)).astype(np.float32)


def write(path: Path, frames: NDArray[np.float32], chunk: int = FRAMES) -> Path:
    with open_writer(path, replace(FORMAT, frames=len(frames))) as writer:
        for start in range(0, len(frames), chunk):
            writer.write(frames[start : start + chunk])
    return path


def read(path: Path) -> NDArray[np.float32]:
    """Read any of the formats back with what others would use."""
    if path.suffix == ".npy":
        array: NDArray[np.float32] = np.load(path, allow_pickle=False)
        return array
    if path.is_dir():
        frames = [np.asarray(Image.open(file)) for file in sorted(path.iterdir())]
    elif path.suffix == ".gif":
        with Image.open(path) as image:
            frames = []
            for index in range(image.n_frames):  # type: ignore[attr-defined]
                image.seek(index)
                frames.append(np.asarray(image.convert("RGB")))
    else:
        with av.open(str(path)) as container:
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return np.stack(frames).astype(np.float32) / np.float32(255)


def content(path: Path) -> dict[str, bytes]:
    """Everything at or under a path, by name."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    return {str(file.relative_to(path)): file.read_bytes() for file in files if file.is_file()}


def psnr(ours: NDArray[np.float32], theirs: NDArray[np.float32]) -> float:
    return float(-10 * np.log10(max(np.mean((ours - theirs) ** 2, dtype=np.float64), 1e-12)))


@pytest.mark.parametrize("name", ["out.mp4", "out.webm", "OUT.MP4"])
def test_compressed_video_keeps_frames_rate_size_and_colour(tmp_path: Path, name: str) -> None:
    frames = smooth()
    path = write(tmp_path / name, frames)
    assert psnr(read(path), frames) > PSNR_FLOOR
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert stream.average_rate == 8
        assert (stream.codec_context.height, stream.codec_context.width) == (HEIGHT, WIDTH)
        assert stream.codec_context.pix_fmt == "yuv420p"
        # 1 is BT.709 in each: untagged, players guess by the size and shift the colours.
        assert stream.codec_context.colorspace == stream.codec_context.color_primaries == 1
        assert stream.codec_context.name == ("vp9" if path.suffix == ".webm" else "h264")


def test_the_psnr_floor_notices_swapped_channels_and_a_lost_frame(tmp_path: Path) -> None:
    frames = smooth()
    back = read(write(tmp_path / "out.mp4", frames))
    assert psnr(back[..., ::-1], frames) < PSNR_FLOOR
    assert psnr(back[:-1], frames[1:]) < PSNR_FLOOR


def test_mp4_can_be_played_before_it_is_loaded(tmp_path: Path) -> None:
    data = write(tmp_path / "out.mp4", smooth()).read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")


def test_gif_keeps_every_frame_its_colours_and_its_pace_and_loops(tmp_path: Path) -> None:
    frames = smooth(16)
    path = write(tmp_path / "out.gif", frames)
    assert psnr(read(path), frames) > PSNR_FLOOR_GIF
    with Image.open(path) as image:
        assert image.info["loop"] == 0
        total = 0
        for index in range(16):
            image.seek(index)
            total += image.info["duration"]
    assert abs(total - 2000) <= 10


def test_gif_keeps_black_and_white(tmp_path: Path) -> None:
    frames = np.zeros((2, HEIGHT, WIDTH, 3), np.float32)
    frames[:, :, WIDTH // 2 :] = 1
    assert np.array_equal(read(write(tmp_path / "out.gif", frames)), frames)


def test_gif_keeps_frames_that_do_not_change(tmp_path: Path) -> None:
    assert len(read(write(tmp_path / "out.gif", np.repeat(smooth(1), 5, axis=0)))) == 5


def test_npy_is_exact(tmp_path: Path) -> None:
    frames = smooth()
    back = read(write(tmp_path / "out.npy", frames))
    assert back.dtype == np.float32
    assert np.array_equal(back, frames)


def test_png_frames_are_what_diffusers_would_save(tmp_path: Path) -> None:
    frames = smooth()
    folder = write(tmp_path / "out", frames)
    assert sorted(content(folder)) == [f"{index:04d}.png" for index in range(FRAMES)]
    theirs = np.stack([np.asarray(image) for image in VaeImageProcessor.numpy_to_pil(frames)])
    assert np.array_equal(read(folder), theirs.astype(np.float32) / 255)
    assert not np.array_equal(read(folder), np.floor(frames * 255).astype(np.float32) / 255)


@every_format
@pytest.mark.parametrize("frames", [1, 2])
def test_the_shortest_videos_can_be_written(tmp_path: Path, name: str, frames: int) -> None:
    assert read(write(tmp_path / name, smooth(frames))).shape == (frames, HEIGHT, WIDTH, 3)


@every_format
def test_odd_chunks_give_the_same_bytes_as_one_write(tmp_path: Path, name: str) -> None:
    frames = smooth()
    whole = content(write(tmp_path / "whole" / name, frames))
    for chunk in (1, 2, 4):
        assert content(write(tmp_path / f"chunks{chunk}" / name, frames, chunk)) == whole
    assert content(write(tmp_path / "other" / name, 1 - frames)) != whole


def test_the_same_frames_give_the_same_bytes_every_time(tmp_path: Path) -> None:
    blocks = np.random.default_rng(0).random((9, 30, 45, 3)).astype(np.float32).repeat(8, 1).repeat(8, 2)
    made = set()
    for _ in range(6):
        with open_writer(tmp_path / "out.mp4", VideoFormat(9, 240, 360, fps=8)) as writer:
            writer.write(blocks)
        made.add((tmp_path / "out.mp4").read_bytes())
    assert len(made) == 1


class Boom(BaseException):
    """Neither an Exception nor anything that is caught by name."""


def fail_after(path: Path, video_format: VideoFormat, chunks: list[NDArray[np.float32]], error: BaseException) -> None:
    with open_writer(path, video_format) as writer:
        for frames in chunks:
            writer.write(frames)
        raise error


@every_format
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, Boom])
def test_a_failure_leaves_the_earlier_video_and_nothing_else(
    tmp_path: Path, name: str, error: type[BaseException]
) -> None:
    path = write(tmp_path / name, smooth())
    before = content(tmp_path)
    with pytest.raises(error):
        fail_after(path, FORMAT, [1 - smooth()[:5]], error())
    assert content(tmp_path) == before


@every_format
def test_a_failure_leaves_nothing_where_nothing_was(tmp_path: Path, name: str) -> None:
    with pytest.raises(KeyboardInterrupt):
        fail_after(tmp_path / name, FORMAT, [smooth()[:5]], KeyboardInterrupt())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "where"),
    [(name, "write.VideoWriter._publish") for name in NAMES]
    + [(name, "encoders.as_bytes") for name in NAMES if name != "out.npy"],
)
def test_an_interrupt_at_any_moment_leaves_nothing(
    tmp_path: Path, name: str, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(f"cvx_deploy.media.{where}", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / name, smooth())
    assert list(tmp_path.iterdir()) == []


@every_format
def test_an_interrupt_from_outside_is_not_lost(tmp_path: Path, name: str) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    frames = smooth(9, 240, 360)
    earlier = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    try:
        with pytest.raises(KeyboardInterrupt):
            fail_after(tmp_path / name, VideoFormat(9000, 240, 360, 8), [frames] * 200, AssertionError("it was lost"))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, earlier)
    assert list(tmp_path.iterdir()) == []


@every_format
def test_too_few_frames_are_no_video(tmp_path: Path, name: str) -> None:
    with pytest.raises(OutputError, match="4 of 9 frames"), open_writer(tmp_path / name, FORMAT) as writer:
        writer.write(smooth()[:4])
    assert list(tmp_path.iterdir()) == []


@every_format
def test_a_new_video_replaces_the_earlier_one(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, smooth())
    assert psnr(read(write(path, 1 - smooth(4))), 1 - smooth(4)) > PSNR_FLOOR_GIF
    assert [entry.name for entry in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("step", [1, 2])
def test_a_folder_survives_a_swap_that_fails_half_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    path = write(tmp_path / "out", smooth())
    before = content(tmp_path)
    calls, rename = [], Path.rename

    def failing(source: Path, target: Path) -> Path:
        calls.append(source)
        if len(calls) == step:
            raise KeyboardInterrupt
        return rename(source, target)

    monkeypatch.setattr(files, "_exchange", lambda *_: False)  # as where two names cannot be swapped in one step
    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(KeyboardInterrupt):
        write(path, 1 - smooth())
    assert content(tmp_path) == before


def test_a_folder_that_got_other_files_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    path = write(tmp_path / "out", smooth())
    with open_writer(path, FORMAT) as writer:
        writer.write(smooth()[:5])
        (path / "thesis.txt").write_text("years of work")
        with pytest.raises(OutputError, match=r"holds thesis\.txt"):
            writer.write(smooth()[5:])
    assert (path / "thesis.txt").read_text() == "years of work"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_link_stays_and_what_it_points_to_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out.npy").symlink_to(tmp_path / "disk" / "real.npy")
    write(tmp_path / "out.npy", smooth())
    assert (tmp_path / "out.npy").is_symlink()
    assert np.array_equal(read(tmp_path / "disk" / "real.npy"), smooth())


def test_a_new_file_has_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "any").touch()
    for name in ("out.mp4", "out.npy"):
        assert write(tmp_path / name, smooth(1)).stat().st_mode == (tmp_path / "any").stat().st_mode


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """Let no file grow beyond `size` bytes; the system then fails the write, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@every_format
def test_a_full_disk_is_stated_and_leaves_the_earlier_video(tmp_path: Path, name: str) -> None:
    frames = np.random.default_rng(0).random((FRAMES, HEIGHT, WIDTH, 3), np.float32)
    path = write(tmp_path / name, frames)
    before = content(tmp_path)
    with full_disk(2000), pytest.raises(OutputError, match="cannot be written: File too large"):
        write(path, frames, chunk=2)
    assert content(tmp_path) == before


def two_videos(path: Path) -> tuple[NDArray[np.float32], ...]:
    videos = (smooth(), 1 - smooth())
    with open_writer(path, replace(FORMAT, videos=2)) as writer:
        for index, frames in enumerate(videos):
            writer.write(frames[:5])
            writer.write(frames[5:])
            if path.suffix != ".npy":
                assert writer.paths[index].exists()  # whole as soon as its last frame is in
    return videos


@every_format
def test_several_videos_are_the_single_ones_side_by_side(tmp_path: Path, name: str) -> None:
    videos = two_videos(tmp_path / name)
    if name == "out.npy":
        assert np.array_equal(read(tmp_path / name), np.stack(videos))
        return
    for index, frames in enumerate(videos):
        several = tmp_path / (f"out/{index}" if name == "out" else f"out-{index}{Path(name).suffix}")
        assert content(several) == content(write(tmp_path / "single" / name, frames))


@pytest.mark.parametrize("name", ["out.mp4", "out.npy"])
def test_a_failure_in_the_second_video_keeps_the_first_where_it_is_a_file_of_its_own(tmp_path: Path, name: str) -> None:
    with pytest.raises(KeyboardInterrupt):
        fail_after(tmp_path / name, replace(FORMAT, videos=2), [smooth(), smooth()[:1]], KeyboardInterrupt())
    assert [entry.name for entry in tmp_path.iterdir()] == (["out-0.mp4"] if name == "out.mp4" else [])


def test_numbers_go_before_the_suffix_or_into_the_folder(tmp_path: Path) -> None:
    assert numbered(Path("a/out.mp4"), 0, 1) == Path("a/out.mp4")
    assert numbered(Path("a/out.v2.mp4"), 11, 12) == Path("a/out.v2-11.mp4")
    assert numbered(Path("a/out.npy"), 1, 2) == Path("a/out.npy")
    assert numbered("a/out/", 1, 2) == Path("a/out/1")
    assert numbered(tmp_path, 1, 2) == tmp_path / "1"


@pytest.mark.parametrize(
    "shape", [(FRAMES + 1, HEIGHT, WIDTH, 3), (0, HEIGHT, WIDTH, 3), (1, WIDTH, HEIGHT, 3), (1, 3, HEIGHT, WIDTH)]
)
def test_frames_that_do_not_fit_are_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match="do not fit"), open_writer(tmp_path / "out.mp4", FORMAT) as writer:
        writer.write(np.zeros(shape, np.float32))


def test_no_chunk_reaches_into_the_next_video_and_none_comes_after_the_last(tmp_path: Path) -> None:
    with open_writer(tmp_path / "out.npy", replace(FORMAT, videos=2)) as writer:
        writer.write(smooth()[:5])
        with pytest.raises(ShapeError, match="up to 4 more"):
            writer.write(smooth()[:5])
        writer.write(smooth()[5:])
        writer.write(smooth())
        with pytest.raises(ShapeError, match="up to 0 more"):
            writer.write(smooth()[:1])


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("value", [np.nan, np.inf, -0.01, 1.01])
def test_values_that_are_no_colours_are_refused(tmp_path: Path, value: float) -> None:
    frames = smooth()
    frames[3, 2, 1, 0] = value
    with pytest.raises(MediaError, match="not in"):
        write(tmp_path / "out.mp4", frames)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["out.mp4", "out.webm"])
def test_odd_sizes_are_refused_where_colour_has_half_the_size(tmp_path: Path, name: str) -> None:
    with pytest.raises(ShapeError, match="even sizes"):
        open_writer(tmp_path / name, replace(FORMAT, height=47))
    frames = smooth(2, 47, 79)
    with open_writer(tmp_path / "out.gif", VideoFormat(2, 47, 79, 8)) as writer:
        writer.write(frames)
    assert read(tmp_path / "out.gif").shape == frames.shape


def refusal(path: Path | str, videos: int = 1) -> str:
    with pytest.raises(OutputError) as caught:
        check_writable(path, videos)
    message = str(caught.value)
    assert "\n" not in message
    with pytest.raises(OutputError):
        open_writer(path, replace(FORMAT, videos=videos))
    return message


@every_format
def test_a_place_in_folders_that_do_not_exist_yet_is_fine_and_checking_creates_nothing(
    tmp_path: Path, name: str
) -> None:
    check_writable(tmp_path / "a" / "b" / name)
    assert list(tmp_path.iterdir()) == []
    write(tmp_path / "a" / "b" / name, smooth(1))


def test_an_unknown_suffix_lists_the_known_ones(tmp_path: Path) -> None:
    assert "end it in .mp4, .webm, .gif, .npy, or in / for a folder" in refusal(tmp_path / "out.mkv")


def test_a_slash_or_an_existing_folder_means_png_frames(tmp_path: Path) -> None:
    with open_writer(f"{tmp_path}/v1.5/", FORMAT) as writer:
        writer.write(smooth())
    (tmp_path / "v2.0").mkdir()
    write(tmp_path / "v2.0", smooth())
    assert content(tmp_path / "v1.5") == content(tmp_path / "v2.0")


@every_format
def test_a_file_in_the_place_of_a_folder_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    assert "is not a folder" in refusal(tmp_path / "file" / name)
    assert "is not a folder" in refusal(tmp_path / "file" / "deeper" / name)
    assert "is a file" in refusal(tmp_path / "file")


@every_format
def test_a_place_where_nothing_can_be_created_is_refused(name: str) -> None:
    # Not even root can make files there: what a read-only mount looks like.
    assert "cannot be written" in refusal(Path("/proc") / name)
    assert "cannot be written" in refusal(Path("/proc/cvx") / name)


def test_a_name_that_is_too_long_is_refused(tmp_path: Path) -> None:
    assert "File name too long" in refusal(tmp_path / f"{'x' * 300}.mp4")


def test_a_write_protected_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out.mp4").touch()
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write to any file
    assert "write-protected" in refusal(tmp_path / "out.mp4")


def test_what_is_neither_file_nor_folder_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.mp4")
    assert "not a file" in refusal(tmp_path / "pipe.mp4")
    (tmp_path / "out-1.mp4").mkdir()
    assert "not a file" in refusal(tmp_path / "out.mp4", videos=2)


@pytest.mark.parametrize("foreign", ["thesis.txt", "1.png", "0000.png.txt", "0000.PNG"])
def test_a_folder_with_anything_else_than_frames_is_refused(tmp_path: Path, foreign: str) -> None:
    write(tmp_path / "out", smooth(2))
    check_writable(tmp_path / "out")
    (tmp_path / "out" / foreign).touch()
    assert f"holds {foreign}" in refusal(tmp_path / "out")


def test_a_folder_that_holds_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out" / "0000.png").mkdir(parents=True)
    assert "not a frame" in refusal(tmp_path / "out")


def test_the_current_folder_and_mounts_are_refused_but_not_folders_in_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "name a folder inside it" in refusal(Path())
    check_writable(Path(), videos=2)
    (tmp_path / "mount").mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda folder: folder.name == "mount")
    assert "name a folder inside it: mount/video" in refusal(Path("mount"))
    write(Path("mount/video"), smooth(1))


def test_a_build_of_pyav_without_the_encoder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(av, "codecs_available", {"gif", "h264"})
    assert "lacks libx264 and libopenh264" in refusal(tmp_path / "out.mp4")
    assert "lacks libvpx-vp9" in refusal(tmp_path / "out.webm")
    check_writable(tmp_path / "out.gif")
    monkeypatch.setattr(av, "codecs_available", {"libopenh264"})
    check_writable(tmp_path / "out.mp4")


GROWING = """
import sys, time
from cvx_deploy.media.encoders import VideoFormat
from cvx_deploy.media.write import open_writer
import numpy as np

with open_writer(sys.argv[1], VideoFormat(9, 16, 16, 8)) as writer:
    writer.write(np.zeros((5, 16, 16, 3), np.float32))
    print("growing", file=sys.stderr, flush=True)
    time.sleep(60)
"""


@every_format
def test_what_a_killed_run_left_is_swept_up_by_the_next(tmp_path: Path, name: str) -> None:
    with spawn(GROWING, tmp_path / name) as process:
        wait_for(process, "growing")
        process.kill()
    assert list(tmp_path.iterdir())  # the lock, and what of the video has been written by then
    write(tmp_path / name, smooth())
    assert [path.name for path in tmp_path.iterdir()] == [name]


@every_format
def test_two_runs_into_one_place_at_once_are_told_before_the_work(tmp_path: Path, name: str) -> None:
    with open_writer(tmp_path / name, FORMAT) as writer:
        writer.write(smooth()[:5])
        with pytest.raises(OutputError, match="another process is writing"):
            check_writable(tmp_path / name)
        writer.write(smooth()[5:])
    check_writable(tmp_path / name)
