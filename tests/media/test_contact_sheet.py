"""A contact sheet shows evenly chosen frames, whatever chunks they come in."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cvx_deploy.errors import OutputError
from cvx_deploy.media.contact_sheet import ContactSheet
from cvx_deploy.media.encoders import VideoFormat


def gray_frames(count: int) -> np.ndarray:
    levels = np.linspace(0, 1, count, dtype=np.float32)
    return np.broadcast_to(levels[:, None, None, None], (count, 16, 64, 3))


def sheet_of(path: Path, frames: np.ndarray, videos: int, chunk: int) -> Image.Image:
    sheet = ContactSheet(VideoFormat(len(frames) // videos, 16, 64, 8, videos=videos))
    for first in range(0, len(frames), chunk):
        sheet.add(frames[first : first + chunk])
    sheet.save(path)
    return Image.open(path)


@pytest.mark.parametrize("chunk", [17, 4, 1])
def test_it_shows_evenly_chosen_frames_from_the_first_to_the_last(tmp_path: Path, chunk: int) -> None:
    picture = sheet_of(tmp_path / "sheet.png", gray_frames(17), 1, chunk)
    assert picture.size == (9 * 64 + 8 * 2, 16)
    shown = [picture.getpixel((column * 66 + 32, 10)) for column in range(9)]
    assert shown == [(round(float(level) * 255),) * 3 for level in np.linspace(0, 1, 17, dtype=np.float32)[::2]]
    assert picture.getpixel((64, 10)) == (255, 255, 255)


def test_each_video_has_a_row_and_no_frame_is_shown_twice(tmp_path: Path) -> None:
    frames = np.concatenate([gray_frames(3), gray_frames(3)[::-1]])
    picture = sheet_of(tmp_path / "sheet.png", frames, 2, 3)
    assert picture.size == (3 * 64 + 2 * 2, 2 * 16 + 2)
    assert picture.getpixel((2, 2)) == picture.getpixel((2 * 66 + 2, 18 + 2)) == (0, 0, 0)
    assert picture.getpixel((2 * 66 + 2, 2)) == picture.getpixel((2, 18 + 2)) == (255, 255, 255)


def test_a_place_that_cannot_be_written_is_stated_and_the_earlier_sheet_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "sheet.png"
    sheet_of(place, gray_frames(3), 1, 3)
    earlier = place.read_bytes()

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OutputError, match="No space left"):
        sheet_of(place, gray_frames(5), 1, 5)
    assert [path.name for path in tmp_path.iterdir()] == ["sheet.png"]
    assert place.read_bytes() == earlier
