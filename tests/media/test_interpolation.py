"""Frames between frames: those that were made stay, those between are nearer than doubling and blending can be."""

import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from cvx_deploy.errors import EngineError, MediaError
from cvx_deploy.media.encoders import VideoFormat
from cvx_deploy.media.film import Film
from cvx_deploy.media.interpolation import Interpolation, Rate
from tests.media.test_write import psnr, read

GAIN = 3.0
"""Least dB by which flow comes nearer to a frame that was left out than blending the two beside it."""
Video = NDArray[np.float32]


def moving(frames: int = 9, height: int = 72, width: int = 96) -> Video:
    """A textured square that moves over a textured ground, and hides and shows parts of it."""
    random = np.random.default_rng(0)
    ground = np.kron(random.random((height // 8, width // 8, 3)), np.ones((8, 8, 1))) * 0.4
    square = 0.5 + 0.5 * np.kron(random.random((6, 6, 3)), np.ones((4, 4, 1)))
    video = np.repeat(ground[None], frames, axis=0)
    for index, frame in enumerate(video):
        left = 6 + 5 * index
        frame[20:44, left : left + 24] = square
    return video.astype(np.float32)


def mean(video: Video) -> Video:
    """Return the blend of each frame and the next."""
    return ((video[1:] + video[:-1]) / 2).astype(np.float32)


def between(video: Video, made: int, wanted: int, piece: int = 100) -> Video:
    flow = Interpolation(Rate(made, wanted))
    pieces = [video[start : start + piece] for start in range(0, len(video), piece)]
    return np.concatenate([frame for frames in pieces for frame in flow.add(frames)])


def test_a_frame_that_was_left_out_is_nearer_than_a_blend_and_a_double() -> None:
    video = moving()
    half, left_out = video[::2], video[1::2]
    made = between(half, 8, 16)[1::2]
    blend, double = mean(half), half[:-1]
    assert psnr(made, left_out) > psnr(blend, left_out) + GAIN
    assert psnr(made, left_out) > psnr(double, left_out) + GAIN


def test_twin_flow_that_is_wrong_is_no_better_than_a_blend(monkeypatch: pytest.MonkeyPatch) -> None:
    import cvx_deploy.media.interpolation as interpolation

    right = interpolation._flow
    monkeypatch.setattr(interpolation, "_flow", lambda first, second: -right(first, second))
    video = moving()
    half, left_out = video[::2], video[1::2]
    assert psnr(between(half, 8, 16)[1::2], left_out) < psnr(mean(half), left_out) + GAIN


@pytest.mark.parametrize("wanted", [8, 12, 16, 24, 30, 60])
def test_frames_lie_at_their_times_and_those_that_were_made_are_as_they_were(wanted: int) -> None:
    video, rate = moving(), Rate(8, wanted)
    made = between(video, 8, wanted)
    assert len(made) == rate.count(len(video)) == (8 * wanted) // 8 + 1
    for index, frame in enumerate(made):
        place = index * 8 / wanted
        assert rate.is_made(index) == place.is_integer()
        if place.is_integer():
            assert np.array_equal(frame, video[int(place)])
        else:
            ends = video[int(place)], video[int(place) + 1]
            assert not any(np.array_equal(frame, end) for end in ends)


def test_what_moves_is_where_the_time_says() -> None:
    made = between(moving(3), 8, 24)
    columns = [float(np.median(np.nonzero(frame[30].mean(axis=-1) > 0.5)[0])) for frame in made]
    assert np.allclose(columns, columns[0] + np.arange(7) * 5 / 3, atol=1.0)


def test_the_same_frames_come_however_they_are_fed() -> None:
    whole = between(moving(), 8, 30)
    for piece in (1, 2, 5):
        assert np.array_equal(between(moving(), 8, 30, piece), whole)


def test_nothing_moves_between_two_frames_that_are_alike() -> None:
    still = np.repeat(moving(1), 4, axis=0)
    assert psnr(between(still, 8, 16), np.repeat(still[:1], 7, axis=0)) > 60


@pytest.mark.parametrize(("height", "width"), [(16, 16), (40, 300)])
def test_small_and_narrow_frames_are_made_between_too(height: int, width: int) -> None:
    frames = np.random.default_rng(0).random((3, height, width, 3)).astype(np.float32)
    made = between(frames, 8, 24)
    assert made.shape == (7, height, width, 3)
    assert made.min() >= 0
    assert made.max() <= 1


def test_fewer_frames_than_are_made_are_refused() -> None:
    with pytest.raises(MediaError, match="use --fps 16 or more"):
        Rate(16, 8)


def test_without_opencv_it_is_said_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    monkeypatch.setattr("cvx_deploy.media.interpolation.find_spec", lambda name: None)
    Rate(8, 8)
    with pytest.raises(EngineError, match="interpolate"):
        Rate(8, 16)


def test_a_film_of_two_videos_makes_nothing_between_them(tmp_path: Path) -> None:
    first, second = moving(3), 1 - moving(3)
    with Film(tmp_path / "out.npy", VideoFormat(3, 72, 96, 8, videos=2), 16, tmp_path / "sheet.png") as film:
        film.add(first[:2])
        film.add(first[2:])
        film.add(second)
    videos = read(tmp_path / "out.npy")
    assert film.interpolated == [1, 3]
    assert film.form.fps == 16
    assert np.array_equal(videos[:, ::2], np.stack([first, second]))
    assert np.array_equal(videos[1], between(second, 8, 16))
    assert (tmp_path / "sheet.png").is_file()
