import judge
import numpy as np
import pytest
import world
from PIL import Image, ImageFilter


@pytest.fixture(scope="module")
def scenes() -> list[world.Scene]:
    return world.random_scenes((11,), 150, "train") + world.random_scenes((12,), 50, "held-out")


@pytest.fixture(scope="module")
def verdicts(scenes: list[world.Scene]) -> list[tuple[str | None, ...]]:
    return [_verdict(world.video_of(scene)) for scene in scenes]


def _verdict(video: np.ndarray) -> tuple[str | None, ...]:
    seen = judge.verdict_on(video)
    return seen.shape, seen.colour, seen.motion


def _blurred(video: np.ndarray, radius: float) -> np.ndarray:
    frames = [Image.fromarray((frame * 255).round().astype(np.uint8)) for frame in video]
    return np.stack([np.asarray(frame.filter(ImageFilter.GaussianBlur(radius))) / 255 for frame in frames])


def test_ground_truth_is_judged_right_in_99_of_100(
    scenes: list[world.Scene], verdicts: list[tuple[str | None, ...]]
) -> None:
    right = [verdict == scene.combination for verdict, scene in zip(verdicts, scenes, strict=True)]
    assert np.mean(right) >= 0.99


def test_mismatched_captions_score_as_chance_does(
    scenes: list[world.Scene], verdicts: list[tuple[str | None, ...]]
) -> None:
    # Each verdict against the scene of another video: one in 3 shapes, 6 colours and 7 motions agrees by chance.
    shifted = [scenes[(i + 37) % len(scenes)].combination for i in range(len(scenes))]
    agree = np.array([[a == b for a, b in zip(*pair, strict=True)] for pair in zip(verdicts, shifted, strict=True)])
    assert np.allclose(agree.mean(axis=0), [1 / 3, 1 / 6, 1 / 7], atol=0.1)
    assert agree.all(axis=1).mean() < 0.03


def test_blur_and_noise_as_of_a_30_db_codec_hardly_matter(scenes: list[world.Scene]) -> None:
    rng = np.random.default_rng(0)
    right = []
    for scene in scenes[:80]:
        video = _blurred(world.video_of(scene), 0.8)
        right.append(_verdict((video + rng.normal(0, 0.03, video.shape)).clip(0, 1)) == scene.combination)
    assert np.mean(right) >= 0.97


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_an_empty_video_shows_nothing(value: float) -> None:
    assert judge.verdict_on(np.full((9, 48, 48, 3), value)) == judge.Verdict(None, None, None)


def test_noise_shows_no_motion_that_a_caption_could_ask_for_by_chance() -> None:
    rng = np.random.default_rng(0)
    shown = [judge.verdict_on(rng.random((9, 48, 48, 3))).motion for _ in range(20)]
    assert set(shown) <= {None, "still"}


def test_a_gray_shape_has_no_colour() -> None:
    scene = world.random_scenes((13,), 1, "train")[0]
    video = world.video_of(scene)
    assert judge.verdict_on(video.mean(axis=-1, keepdims=True).repeat(3, axis=-1)).colour is None


def test_a_video_run_backwards_moves_the_other_way() -> None:
    opposite = {"left": "right", "up": "down", "growing": "shrinking", "still": "still"}
    opposite |= {there: back for back, there in opposite.items()}
    for scene in world.random_scenes((14,), 40, "train"):
        assert judge.verdict_on(world.video_of(scene)[::-1]).motion == opposite[scene.motion]
