"""A run that was cut off and goes on comes out as one that was not, to the bit."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cvx_deploy import Pipeline
from cvx_deploy.errors import CvxError, MediaError, PromptError, ShapeError
from cvx_deploy.pipeline.events import Denoised, Step
from cvx_deploy.pipeline.noise import Generator
from cvx_deploy.pipeline.resume import ResumePoint

PROMPT = "a red circle moves to the right"
STEPS = 4


@pytest.fixture(scope="module")
def pipe() -> Iterator[Pipeline]:
    with Pipeline.from_pretrained("mini", threads=1) as pipeline:
        yield pipeline


def request(scheduler: str, **more: Any) -> dict[str, Any]:
    return {"prompt": PROMPT, "seed": 7, "num_inference_steps": STEPS, "scheduler": scheduler, **more}


def cut_off(pipe: Pipeline, after: int, asked: dict[str, Any]) -> ResumePoint:
    """Begin a run, end it after so many steps, and return where it stood."""
    stream = pipe.stream(**asked)
    steps = [next(stream) for _ in range(after)]
    stream.close()
    last = steps[-1]
    assert isinstance(last, Step)
    assert last.point is not None
    return last.point


@pytest.mark.parametrize("scheduler", ["ddim", "dpm"])
def test_a_run_that_goes_on_ends_as_the_undisturbed_one(pipe: Pipeline, scheduler: str, tmp_path: Path) -> None:
    asked = request(scheduler)
    whole = pipe(**asked)
    for after in range(1, STEPS + 1):
        cut_off(pipe, after, asked).save(tmp_path / "point.npz")
        point = ResumePoint.load(tmp_path / "point.npz")
        events = list(pipe.stream(**asked, resume=point))
        assert sum(isinstance(event, Step) for event in events) == STEPS - after
        [latents] = [event.latents for event in events if isinstance(event, Denoised)]
        assert np.array_equal(latents, whole.latents)
    assert np.array_equal(pipe(**asked, resume=point).frames, whole.frames)


def test_from_a_video_too(pipe: Pipeline) -> None:
    clip = np.random.default_rng(0).integers(0, 255, (9, 48, 48, 3)).astype(np.uint8)
    asked = request("dpm", video=clip, strength=0.8)
    assert np.array_equal(pipe(**asked, resume=cut_off(pipe, 2, asked)).frames, pipe(**asked).frames)


def test_a_loop_by_windows_goes_on_where_its_windows_were(pipe: Pipeline) -> None:
    asked = request("dpm", num_frames=16, loop=True)
    point = cut_off(pipe, 2, asked)
    assert np.array_equal(pipe(**asked, resume=point).latents, pipe(**asked).latents)
    with pytest.raises(ShapeError, match="resume with what the run was begun with"):
        pipe(**request("dpm", num_frames=17), resume=point)


@pytest.mark.parametrize("lost", ["previous", "noise", "latents"])
def test_twin_a_point_that_lost_a_part_ends_elsewhere(pipe: Pipeline, lost: str) -> None:
    asked = request("dpm")
    point = cut_off(pipe, 2, asked)
    without: dict[str, Any] = {
        "previous": None,
        "noise": Generator(0).state(),
        "latents": np.nextafter(point.latents, np.float32(9)),
    }
    damaged = replace(point, **{lost: without[lost]})
    assert not np.array_equal(pipe(**asked, resume=damaged).latents, pipe(**asked).latents)


def test_a_generator_goes_on_where_another_stood() -> None:
    for shape in ((3,), (5, 7)):  # the scalar kernel, which keeps a value, and the other one
        first, second = Generator(3), Generator(4)
        first.randn(shape)
        second.restore(first.state())
        assert np.array_equal(first.randn((5,)), second.randn((5,)))
        assert np.array_equal(first.randn((20,)), second.randn((20,)))


def test_a_point_of_another_run_is_refused(pipe: Pipeline) -> None:
    point = cut_off(pipe, 2, request("dpm"))
    with pytest.raises(ShapeError, match="of 4 steps"):
        pipe(**{**request("dpm"), "num_inference_steps": 5}, resume=point)
    with pytest.raises(PromptError, match="what forecasts rest on"):
        pipe(**request("dpm"), cache="fixed", resume=point)
    with pytest.raises(CvxError, match="one video"):
        pipe(**request("dpm"), num_videos_per_prompt=2, resume=point)


def test_where_steps_are_forecast_there_is_no_point(pipe: Pipeline) -> None:
    event = next(pipe.stream(**request("ddim"), cache="fixed"))
    assert isinstance(event, Step)
    assert event.point is None


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x00" * 100, None])
def test_a_damaged_file_is_refused_in_one_line(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "point.npz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(MediaError, match="point"):
        ResumePoint.load(path)
