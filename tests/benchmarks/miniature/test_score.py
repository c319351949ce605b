import numpy as np
import pytest
import score
import world


@pytest.fixture(scope="module")
def truth() -> tuple[np.ndarray, list[str]]:
    scenes, captions = score.held_out_examples(60)
    return world.videos_of(scenes), captions


def test_ground_truth_scores_full_marks(truth: tuple[np.ndarray, list[str]]) -> None:
    videos, captions = truth
    result = score.score(videos, captions, images=videos[:, 0])
    assert result.all.share >= 0.98
    assert result.first_frame_psnr == pytest.approx(120)


def test_other_peoples_videos_score_as_chance_does(truth: tuple[np.ndarray, list[str]]) -> None:
    videos, captions = truth
    result = score.score(videos, captions[7:] + captions[:7])
    assert result.all.share < 0.1
    assert result.first_frame_psnr is None


def test_first_frame_psnr_is_that_of_the_first_frame_only(truth: tuple[np.ndarray, list[str]]) -> None:
    videos, captions = truth
    images = np.clip(videos[:, 0] * 0 + 0.5, 0, 1)
    off = videos.copy()
    off[:, 0] = 0.6
    assert score.score(off, captions, images).first_frame_psnr == pytest.approx(20, abs=1e-3)


def test_held_out_examples_are_held_out_and_always_the_same() -> None:
    scenes, captions = score.held_out_examples(30)
    again, captions_again = score.held_out_examples(30)
    assert scenes == again
    assert captions == captions_again
    assert {scene.combination for scene in scenes} <= set(world.combinations("held-out"))


def test_wilson_interval_matches_its_textbook_value() -> None:
    low, high = score.Share(180, 200).interval
    assert (low, high) == pytest.approx((0.8506, 0.9343), abs=1e-4)


def test_score_as_json_holds_counts_shares_and_intervals(truth: tuple[np.ndarray, list[str]]) -> None:
    videos, captions = truth
    table = score.score(videos[:5], captions[:5]).to_json()
    assert set(table) == {"shape", "colour", "motion", "all", "first_frame_psnr"}
    assert table["all"]["total"] == 5
    assert table["all"]["interval"][0] <= table["all"]["share"] <= table["all"]["interval"][1]
