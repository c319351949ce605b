"""How many clips a video takes, what each brings, and which prompt it has."""

from pathlib import Path

import pytest

from cvx_deploy.errors import CvxError, PromptError, ShapeError
from cvx_deploy.longer.plan import Lengths, clips_of
from cvx_deploy.longer.script import Script

NINE = Lengths(9, 9)


@pytest.mark.parametrize("frames", [1, 8, 9, 10, 17, 18, 60, 4096])
@pytest.mark.parametrize("lengths", [NINE, Lengths(9, 9, 3), Lengths(49, 25, 24), Lengths(0, 9)])
def test_clips_bring_every_frame_once_and_none_is_empty(frames: int, lengths: Lengths) -> None:
    clips = clips_of(frames, lengths.starts(frames), ["a"], 7)
    brought = [frame for clip in clips for frame in range(clip.start, clip.start + clip.frames)]
    assert brought == list(range(frames))
    assert all(0 < clip.frames <= max(lengths.first, lengths.then) for clip in clips)
    assert [clip.seed for clip in clips] == list(range(7, 7 + len(clips)))


def test_a_clip_is_shown_but_for_what_it_shares() -> None:
    assert NINE.starts(27) == [0, 9, 17, 25]
    assert Lengths(9, 9, 3).starts(27) == [0, 9, 15, 21]
    assert Lengths(0, 9).starts(20) == [0, 8, 16]


@pytest.mark.parametrize("overlap", [0, -1, 9, 100])
def test_clips_that_cannot_overlap_so_are_refused(overlap: int) -> None:
    with pytest.raises(ShapeError, match="--overlap 1, or another from 1 to 8"):
        Lengths(9, 9, overlap)
    assert Lengths(9, 9, 8).starts(11) == [0, 9, 10]


@pytest.mark.parametrize("frames", [0, -3, 4097])
def test_a_length_that_no_video_has_is_refused(frames: int) -> None:
    with pytest.raises(ShapeError, match="ask for 1 to 4096 frames"):
        NINE.starts(frames)


def test_there_is_one_prompt_or_one_a_clip() -> None:
    starts = NINE.starts(20)
    assert [clip.prompt for clip in clips_of(20, starts, ["a", "b", "c"], 0)] == ["a", "b", "c"]
    with pytest.raises(PromptError, match="2 prompts for 3 clips"):
        clips_of(20, starts, ["a", "b"], 0)


def script(folder: Path, text: str) -> Script:
    (folder / "script.txt").write_text(text)
    return Script.read(folder / "script.txt")


def test_a_script_says_what_is_shown_in_the_middle_of_each_clip(tmp_path: Path) -> None:
    read = script(tmp_path, "# times in seconds\n\n0 a red circle\n1s  a blue square\n3.2 a triangle, 3 sides\n")
    starts = NINE.starts(33)
    assert read.prompts(starts, 33, 8) == ("a red circle", "a blue square", "a blue square", "a triangle, 3 sides")


BAD = {
    "1 a red circle": "begins at 1 s",
    "": "says nothing",
    "0 a\n2 b\n2 c": "2 s comes after 2 s",
    "0 a\nlater b": "line 2, is no time and prompt",
    "0 a\nnan b": "line 2, is no time and prompt",
    "0": "line 1, is no time and prompt",
}


@pytest.mark.parametrize("text", BAD)
def test_a_script_that_makes_no_sense_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(PromptError) as failure:
        script(tmp_path, text)
    assert BAD[text] in str(failure.value)


@pytest.mark.parametrize("content", [b"0 \xff\xfe", None])
def test_a_script_that_cannot_be_read_is_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "script.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CvxError, match=r"script\.txt"):
        Script.read(path)


def test_a_prompt_that_no_clip_shows_is_refused_with_the_times_of_the_clips(tmp_path: Path) -> None:
    read = script(tmp_path, "0 a\n2 b\n2.1 c\n")
    with pytest.raises(PromptError, match=r"begin at 0, 1\.125, 2\.125 s"):
        read.prompts(NINE.starts(25), 25, 8)
