"""A chain of clips: one is today's run to the bit, several go on from each other, and a cut changes nothing."""

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from cvx_deploy import Pipeline
from cvx_deploy.errors import CvxError, MediaError, OutputError, PromptError, ShapeError
from cvx_deploy.longer.chain import Chain, ClipMade
from cvx_deploy.longer.match import levels_of, matched
from cvx_deploy.longer.write import LongRequest, write_long
from cvx_deploy.media.encoders import as_bytes
from cvx_deploy.pipeline.events import Event, Frames, Step
from tests.command import TELLING, cvx, signalled, spawn, wait_for

UP, DOWN = "a blue square moves up", "a blue square moves down"
STEPS: dict[str, Any] = {"num_inference_steps": 2}
FRAMES = 9
Video = NDArray[np.float32]


@pytest.fixture(scope="module")
def chain() -> Iterator[Chain]:
    with (
        Pipeline.from_pretrained("mini", threads=1, residency="phase") as first,
        Pipeline.from_pretrained("mini-i2v", threads=1) as then,
    ):
        yield Chain(first, then)


def following(chain: Chain, prompt: str, **given: Any) -> NDArray[np.uint8]:
    """Return what the second pipeline makes by itself."""
    assert chain.then is not None
    return as_bytes(chain.then(prompt, **{**given, **STEPS}).frames[0])


def made(chain: Chain, prompt: Any = UP, **given: Any) -> Video:
    events = chain.stream(prompt, seed=7, **STEPS, **given)
    return np.concatenate([event.frames for event in events if isinstance(event, Frames)])


def test_one_clip_is_that_of_a_pipeline_to_the_bit(chain: Chain) -> None:
    alone = chain.first(UP, seed=7, **STEPS).frames[0]
    assert np.array_equal(made(chain, num_frames=FRAMES), alone)
    assert np.array_equal(made(chain, num_frames=5), alone[:5])


def test_each_clip_goes_on_from_the_last_frame_of_the_one_before(chain: Chain) -> None:
    video = made(chain, [UP, DOWN, UP], num_frames=22)
    first = as_bytes(chain.first(UP, seed=7, **STEPS).frames[0])
    second = following(chain, DOWN, image=first[-1], seed=8)
    second = matched(second, first[-1:], levels_of(first))
    third = following(chain, UP, image=second[-1], seed=9)
    third = matched(third, second[-1:], levels_of(first))
    assert np.array_equal(as_bytes(video), np.concatenate([first, second[1:], third[1:6]]))


def test_frames_and_clips_are_numbered_as_they_come(chain: Chain) -> None:
    events = list(chain.stream([UP, DOWN], num_frames=17, seed=7, **STEPS))
    assert [(event.video, event.index) for event in events if isinstance(event, Step)] == [
        (clip, step) for clip in range(2) for step in range(2)
    ]
    frames = [event for event in events if isinstance(event, Frames)]
    assert [event.start for event in frames] == [0, *np.cumsum([len(event.frames) for event in frames])[:-1]]
    clips = [event.clip for event in events if isinstance(event, ClipMade)]
    assert [(clip.start, clip.frames, clip.prompt, clip.seed) for clip in clips] == [(0, 9, UP, 7), (9, 8, DOWN, 8)]


def test_shared_frames_are_blended_from_one_clip_into_the_other(chain: Chain) -> None:
    events = list(chain.stream(UP, num_frames=15, overlap=3, seed=7, **STEPS))
    video = as_bytes(np.concatenate([event.frames for event in events if isinstance(event, Frames)]))
    first, second = (event.pixels for event in events if isinstance(event, ClipMade))
    assert np.array_equal(video[:7], first[:7])
    assert np.array_equal(video[9:], second[3:])
    for index, weight in ((7, 1 / 3), (8, 2 / 3)):
        blend = (1 - weight) * first[index].astype(float) + weight * second[index - 6]
        assert np.abs(video[index] - blend).max() <= 1


@pytest.mark.parametrize("overlap", [1, 4])
def test_a_chain_gone_on_with_is_the_whole_one(chain: Chain, overlap: int) -> None:
    given: dict[str, Any] = {"num_frames": 24, "overlap": overlap, "seed": 7, **STEPS}
    whole = list(chain.stream(UP, **given))
    clips = [event.pixels for event in whole if isinstance(event, ClipMade)]
    assert len(clips) > 2
    again = list(chain.stream(UP, kept=clips[:2], **given))
    assert [event.clip.index for event in again if isinstance(event, ClipMade)] == list(range(2, len(clips)))
    first, second = ([one.frames for one in events if isinstance(one, Frames)] for events in (whole, again))
    assert np.array_equal(np.concatenate(first), np.concatenate(second))


def test_twin_a_kept_clip_that_is_another_is_another_video(chain: Chain) -> None:
    clips = [e.pixels for e in chain.stream(UP, num_frames=24, seed=7, **STEPS) if isinstance(e, ClipMade)]
    assert not np.array_equal(
        made(chain, num_frames=24, kept=[255 - clips[0]])[FRAMES:], made(chain, num_frames=24)[FRAMES:]
    )


def test_a_video_that_is_there_is_continued(chain: Chain) -> None:
    there = as_bytes(made(chain, num_frames=17))
    more = as_bytes(made(chain, DOWN, num_frames=12, continued=there[FRAMES:]))
    second = following(chain, DOWN, image=there[-1], seed=7)
    assert np.array_equal(more[:8], matched(second, there[-1:], levels_of(there[FRAMES:]))[1:])
    assert len(more) == 12


def test_what_a_chain_cannot_do_is_refused(chain: Chain) -> None:
    there = np.zeros((3, 48, 48, 3), np.uint8)
    refused: list[tuple[type[CvxError], dict[str, Any]]] = [
        (ShapeError, {"num_frames": 0}),
        (ShapeError, {"num_frames": 20, "overlap": 9}),
        (ShapeError, {"num_frames": 20, "overlap": 2, "continued": there}),
        (CvxError, {"num_frames": 20, "continued": there, "image": there[0]}),
        (CvxError, {"num_frames": 20, "latents": there}),
        (PromptError, {"num_frames": 20, "prompt": [UP, DOWN]}),
    ]
    for kind, given in refused:
        with pytest.raises(kind):
            made(chain, **given)
    with pytest.raises(PromptError, match="no image-to-video model"):
        Chain(chain.first, chain.first)
    with pytest.raises(PromptError, match="export an image-to-video model of 48x48"):
        made(Chain(chain.first, None), num_frames=10)
    assert len(made(Chain(chain.first, None), num_frames=4)) == 4


class _CutError(Exception):
    pass


def cut_in_clip(number: int) -> Any:
    def watch(event: Event) -> None:
        if isinstance(event, Step) and event.video == number:
            raise _CutError

    return watch


def request(output: Path, **given: Any) -> LongRequest:
    return LongRequest((UP, DOWN, UP), 25, output, seed=7, how=STEPS, **given)


@pytest.mark.parametrize("name", ["out.mp4", "out.npy"])
def test_a_run_that_was_cut_off_goes_on_at_its_last_whole_clip(chain: Chain, tmp_path: Path, name: str) -> None:
    write_long(chain, request(tmp_path / f"whole-{name}", fps=16))
    with pytest.raises(_CutError):
        write_long(chain, request(tmp_path / name, fps=16), watch=cut_in_clip(2))
    assert not (tmp_path / name).exists()
    assert sorted(path.name for path in (tmp_path / f"{name}.clips").iterdir()) == ["0000.npy", "0001.npy", "mark.json"]
    seen: list[int] = []
    report = write_long(
        chain, request(tmp_path / name, fps=16), watch=lambda e: seen.append(e.video) if isinstance(e, Step) else None
    )
    assert set(seen) == {2}, "only the last clip is made"
    assert [seconds is None for seconds in report.seconds] == [True, True, False]
    assert (tmp_path / name).read_bytes() == (tmp_path / f"whole-{name}").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([name, f"whole-{name}"])


def test_clips_of_another_run_are_refused_and_stay(chain: Chain, tmp_path: Path) -> None:
    with pytest.raises(_CutError):
        write_long(chain, request(tmp_path / "out.mp4"), watch=cut_in_clip(1))
    others: list[dict[str, Any]] = [{"seed": 8}, {"prompts": (UP,)}, {"hold_colours": False}, {"how": {}}]
    for other in others:
        fields: dict[str, Any] = {"prompts": (UP, DOWN, UP), "frames": 25, "seed": 7, "how": STEPS, **other}
        with pytest.raises(OutputError, match="another run that was cut off"):
            write_long(chain, LongRequest(output=tmp_path / "out.mp4", **fields))
    assert (tmp_path / "out.mp4.clips" / "0000.npy").is_file()


@pytest.mark.parametrize("damage", [b"", b"no clip", None])
def test_a_kept_clip_that_is_damaged_is_refused(chain: Chain, tmp_path: Path, damage: bytes | None) -> None:
    with pytest.raises(_CutError):
        write_long(chain, request(tmp_path / "out.mp4"), watch=cut_in_clip(1))
    clip = tmp_path / "out.mp4.clips" / "0000.npy"
    if damage is None:
        np.save(clip, np.zeros((9, 48, 48)))
    else:
        clip.write_bytes(damage)
    with pytest.raises(MediaError, match=r"0000\.npy"):
        write_long(chain, request(tmp_path / "out.mp4"))


WORDS = ("run", "--prompt", UP, "--frames", 25, "--steps", 2, "--threads", 1, "--seed", 7)


def test_a_run_that_is_killed_goes_on_and_gives_the_same_bytes(tmp_path: Path) -> None:
    words = (*WORDS, "--output", tmp_path / "out.mp4")
    process = spawn(TELLING + "main()", *words, "-q")
    wait_for(process, "now: clips")
    for _ in range(3):
        wait_for(process, "now: decode")
    signalled(process, signal.SIGKILL)
    assert (tmp_path / "out.mp4.clips" / "0001.npy").is_file()
    again = cvx(*words)
    assert again.code == 0
    assert "2 of 3 clips are there already" in again.err
    assert cvx(*WORDS, "--output", tmp_path / "whole.mp4").code == 0
    assert (tmp_path / "out.mp4").read_bytes() == (tmp_path / "whole.mp4").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.mp4", "whole.mp4"]


def test_the_command_line_makes_what_python_makes_and_says_of_what_it_is(chain: Chain, tmp_path: Path) -> None:
    said = cvx(*WORDS, "--output", tmp_path / "out.npy", "--json", "-q", "--fps", 24)
    values = json.loads(said.out)
    video = made(chain, num_frames=25)
    written = np.load(tmp_path / "out.npy")
    assert np.array_equal(written[::3], video)
    assert (values["long"], values["fps"], values["frames"]) == ("chain", 24, 73)
    assert values["seeds"] == [7, 8, 9]
    assert values["interpolated"] == [index for index in range(73) if index % 3]
    assert [(clip["start"], clip["frames"], clip["prompt"]) for clip in values["clips"]] == [
        (0, 9, UP),
        (9, 8, UP),
        (17, 8, UP),
    ]
    assert values["image_bundle"].endswith("mini-i2v")


def test_several_prompts_are_one_a_clip(tmp_path: Path) -> None:
    words = ("run", "--prompt", UP, "--prompt", DOWN, "--long", "chain", "--steps", 2, "--threads", 1, "--json", "-q")
    values = json.loads(cvx(*words, "--output", tmp_path / "out.npy").out)
    assert [clip["prompt"] for clip in values["clips"]] == [UP, DOWN]
    assert values["frames"] == 17


def test_seconds_and_a_script_say_how_long_it_is_and_what_it_shows(tmp_path: Path) -> None:
    (tmp_path / "script.txt").write_text(f"0 {UP}\n1 {DOWN}\n")
    words = ("run", "--script", tmp_path / "script.txt", "--seconds", 2, "--steps", 2, "--threads", 1, "--json", "-q")
    values = json.loads(cvx(*words, "--output", tmp_path / "out.npy").out)
    assert [clip["prompt"] for clip in values["clips"]] == [UP, DOWN]
    assert (values["frames"], len(np.load(tmp_path / "out.npy"))) == (16, 16)


def test_a_run_at_another_rate_names_the_frames_between(tmp_path: Path) -> None:
    words = ("run", "--prompt", UP, "--steps", 2, "--threads", 1, "--seed", 7, "-q", "--json")
    plain = json.loads(cvx(*words, "--output", tmp_path / "out.npy").out)
    assert (plain["fps"], plain["interpolated"]) == (8, [])
    values = json.loads(cvx(*words, "--output", tmp_path / "fast.npy", "--fps", 16).out)
    assert (values["fps"], values["interpolated"]) == (16, list(range(1, 17, 2)))
    assert np.array_equal(np.load(tmp_path / "fast.npy")[::2], np.load(tmp_path / "out.npy"))


REFUSED: list[tuple[tuple[object, ...], str]] = [
    (("--seconds", "1e6"), "use --seconds from 0.125 to 512"),
    (("--frames", 30, "--overlap", 9), "use --overlap 1, or another from 1 to 8"),
    (("--frames", 30, "--overlap", 0, "--long", "chain"), "use --overlap 1, or another from 1 to 8"),
    (("--fps", 4), "use --fps 8 or more"),
    (("--frames", 30, "--fps", 7), "use --fps 8 or more"),
    (("--frames", 30, "--num-videos", 2), "leave --num-videos out"),
    (("--frames", 30, "--save-latents", "latents.npy"), "leave --save-latents out"),
    (("--frames", 30, "--image-model", "mini"), "name one that is with --image-model"),
    (("--frames", 30, "--image-model", "nothing"), "nothing"),
    (("--free-colours",), "leave --free-colours out"),
    (("--image-model", "mini-i2v"), "leave --image-model out"),
    (("--seconds", 3, "--prompt", DOWN), "give one, or 3"),
]


@pytest.mark.parametrize(("words", "fix"), REFUSED, ids=lambda value: "-".join(map(str, value))[:40])
def test_what_cannot_be_made_is_refused_and_nothing_is_left(
    tmp_path: Path, words: tuple[object, ...], fix: str
) -> None:
    said = cvx("run", "--prompt", UP, "--steps", 2, "--output", tmp_path / "out.mp4", *words)
    assert fix in said.failure()
    assert list(tmp_path.iterdir()) == []


def test_a_bundle_that_cannot_go_on_says_what_to_export(tmp_path: Path) -> None:
    import shutil

    from cvx_deploy.miniatures import miniature

    shutil.copytree(miniature("mini"), tmp_path / "alone")
    words = ("run", "--bundle", tmp_path / "alone", "--prompt", UP, "--frames", 30, "--long", "chain")
    said = cvx(*words, "--output", tmp_path / "out.mp4").failure()
    assert "no image-to-video bundle alone-i2v beside it" in said
    assert "name it with --image-model" in said
