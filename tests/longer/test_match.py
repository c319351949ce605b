"""A clip is brought to the colours of the one before it; drift over many is held, where it is not by itself."""

import numpy as np
import pytest
from numpy.typing import NDArray

from cvx_deploy.longer.match import levels_of, matched

DRIFT = 0.01
"""Largest share by which brightness may have moved after ten clips."""
STEP = 0.6  # of 255: rounding, and a little
Clip = NDArray[np.uint8]


def scene(shift: float = 0.0, gain: float = 1.0, lift: float = 0.0) -> Clip:
    """A bright square that moves over a slope, in colours that are off, and get brighter by `lift` in each frame."""
    frames = np.empty((9, 48, 48, 3), np.float32)
    for index, frame in enumerate(frames):
        frame[:] = np.linspace(60, 120, 48)[:, None, None] * np.array([1.0, 0.9, 0.8])
        frame[18:30, 6 + 2 * index : 18 + 2 * index] = (200, 40, 30)
        frame[:] = (frame - 100) * gain + 100 + shift + lift * index
    return frames.round().clip(0, 255).astype(np.uint8)


def test_a_clip_in_other_colours_takes_those_of_the_one_before() -> None:
    right = scene()
    for wrong in (scene(shift=9), scene(gain=1.15), scene(shift=-7, gain=0.9)):
        assert np.abs(wrong.astype(float) - right).mean() > 3
        assert np.abs(matched(wrong, right[:1], None).astype(float) - right).mean() < STEP


def test_a_clip_in_the_right_colours_stays_as_it_is() -> None:
    right = scene()
    assert np.array_equal(matched(right, right[:1], None), right)


def test_what_is_another_picture_after_all_does_not_blow_up() -> None:
    plain = np.full((9, 48, 48, 3), 90, np.uint8)
    spread = np.abs(matched(plain, scene()[:1], levels_of(scene())).astype(float).std(axis=(1, 2))[-1])
    assert spread.max() <= 1
    assert matched(scene(), plain[:1], levels_of(plain)).std() < 60


def drift(*, held: bool) -> list[float]:
    """How far the median of each of ten clips is from the first one's, a share: the model brightens each."""
    clips = [scene()]
    levels = levels_of(clips[0]) if held else None
    for _ in range(9):
        clips.append(matched(scene(shift=5, lift=1.0), clips[-1][-1:], levels))
    first = np.median(clips[0])
    return [abs(float(np.median(clip)) / first - 1) for clip in clips]


def test_brightness_is_held_over_ten_clips() -> None:
    assert max(drift(held=True)) < DRIFT


def test_twin_without_it_brightness_drifts_away() -> None:
    assert max(drift(held=False)) > 20 * DRIFT


def test_something_bright_that_comes_is_no_drift() -> None:
    before, clip = scene(), scene()
    clip[4:, :20, :20] = 255
    led = matched(clip, before[:1], levels_of(before))
    assert led[5:, :20, :20].min() > 230


@pytest.mark.parametrize("overlap", [1, 3])
def test_a_clip_begins_with_the_frame_that_it_was_given(overlap: int) -> None:
    shared = scene()[-overlap:]
    assert np.array_equal(matched(scene(shift=12), shared, levels_of(scene()))[0], shared[0])
