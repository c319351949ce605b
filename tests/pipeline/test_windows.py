"""Videos larger than a bundle's shape: what windows say is averaged, one window changes nothing, loops close."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from cvx_deploy import Pipeline
from cvx_deploy.bundle.opened import Bundle
from cvx_deploy.engines.onnxruntime.backend import OrtBackend
from cvx_deploy.errors import CvxError, PromptError, ShapeError
from cvx_deploy.pipeline.axis import Axis
from cvx_deploy.pipeline.events import Frames
from cvx_deploy.pipeline.noise import Generator
from cvx_deploy.pipeline.report import RunReport
from cvx_deploy.pipeline.request import RunRequest
from cvx_deploy.pipeline.run import make_latents, scheduler_for
from cvx_deploy.pipeline.sampler import modulation_of
from cvx_deploy.pipeline.shapes import ShapeChoice
from cvx_deploy.pipeline.windows import Windows, bundle_and_windows, plan_for
from cvx_deploy.progress import SilentProgress
from cvx_deploy.shape import Shape
from tests.command import cvx
from tests.conftest import Exported
from tests.tolerances import LOOP_PSNR, WINDOWS_RELATIVE

PROMPT = "a red circle moves to the right"
STEPS: dict[str, Any] = {"num_inference_steps": 2}
LARGE = Shape(17, 56, 48)
Latents = NDArray[np.float32]


def psnr(one: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    return float(-10 * np.log10(max(np.square(one - other).mean(dtype=np.float64), 1e-20)))


@pytest.mark.parametrize("length", [5, 6, 7, 11, 20])
@pytest.mark.parametrize(("window", "overlap", "period"), [(4, 2, 2), (5, 0, 1), (5, 2, 1), (4, 3, 1)])
@pytest.mark.parametrize("ring", [False, True])
def test_windows_reach_every_place_and_their_weights_sum_to_one(
    length: int, window: int, overlap: int, period: int, ring: bool
) -> None:
    length = -(-length // period) * period
    axis = Axis.of(length, window, overlap, period, ring=ring)
    for turn in range(3):
        total = np.zeros(length)
        for places, weights in axis.cuts(turn):
            assert places[0] % period == 0
            assert len(set(places)) == window
            total[places] += weights
        assert total == pytest.approx(1)
    assert ring or all(np.all(np.diff(places) == 1) for places, _ in axis.cuts())


def test_neighbours_share_what_is_asked_for() -> None:
    for overlap in range(4):
        starts = Axis.of(23, 4, overlap).starts
        assert starts[-1] == 19
        assert max(np.diff(starts)) <= 4 - overlap


def test_a_loop_s_windows_begin_everywhere_in_time() -> None:
    axis = Axis.of(14, 4, 2, 2, ring=True)
    assert {int(axis.cuts(turn)[0][0][0]) for turn in range(7)} == set(range(0, 14, 2))


@pytest.mark.parametrize("scheduler", ["ddim", "dpm"])
def test_one_window_is_the_video_without_windows_to_the_bit(pipe: Pipeline, scheduler: Any, tmp_path: Path) -> None:
    plain = RunRequest((PROMPT,), tmp_path / "plain.npy", steps=2, scheduler=scheduler)
    pipe.run(plain)
    pipe.run(replace(plain, output=tmp_path / "one.npy", windows=Windows(pipe.bundle.shape, freenoise=True)))
    assert (tmp_path / "plain.npy").read_bytes() == (tmp_path / "one.npy").read_bytes()


def by_hand(bundle: Bundle, shape: Shape, scheduler_kind: Any, *, triangular: bool = True) -> Latents:
    """Denoise without the sampler: 3x6x6 latents at written-out places, sums of predictions over sums of weights."""
    backend, request = OrtBackend(bundle), RunRequest((PROMPT,), steps=2, guidance_scale=2, scheduler=scheduler_kind)
    assert shape == LARGE
    generator, scheduler = Generator(0), scheduler_for(bundle.manifest, request)
    latents = generator.randn((1, 5, 8, 7, 6))
    modulation = modulation_of(backend, scheduler)
    with Pipeline(bundle) as pipeline:
        embeds = pipeline_embeds(pipeline)
    with backend.load("transformer", {"batch": 2}) as session:
        for step in range(2):
            total, weight = np.zeros((2, *latents.shape[1:])), np.zeros(latents.shape[1:])
            for t, y in ((0, 0), (0, 1), (2, 0), (2, 1)):
                inside = (slice(t, t + 3), slice(None), slice(y, y + 6))
                taken = {"hidden_states": np.repeat(latents[0][inside][None], 2, 0), "encoder_hidden_states": embeds}
                said = backend.to_host(session.run({**taken, "modulation": modulation[step]})["noise_pred"])
                shares = [np.minimum(np.arange(1, n + 1), np.arange(n, 0, -1)) ** triangular for n in (3, 6, 6)]
                share = np.einsum("t,y,x->tyx", *shares)[:, None]
                for branch in range(2):
                    total[branch][inside] += said[branch] * share
                weight[inside] += share
            negative, positive = total / weight
            guided = (negative + 2 * (positive - negative)).astype(np.float32)[None]
            latents = scheduler.step(step, guided, latents, generator)
    return latents


def pipeline_embeds(pipeline: Pipeline) -> Latents:
    from cvx_deploy.pipeline.prompts import embed

    found, _ = embed(OrtBackend(pipeline.bundle), ["", PROMPT], None, SilentProgress())
    return np.stack([found[""], found[PROMPT]])


@pytest.mark.parametrize("scheduler", ["ddim", "dpm"])
def test_a_larger_video_is_the_weighted_average_of_its_windows(pipe: Pipeline, scheduler: Any) -> None:
    request = RunRequest((PROMPT,), steps=2, guidance_scale=2, scheduler=scheduler, windows=Windows(LARGE))
    found = make_latents(OrtBackend(pipe.bundle), request, SilentProgress(), RunReport())
    expected = by_hand(pipe.bundle, LARGE, scheduler)
    assert np.abs(found - expected).max() < WINDOWS_RELATIVE * np.abs(expected).max()
    even = by_hand(pipe.bundle, LARGE, scheduler, triangular=False)
    assert np.abs(found - even).max() > 100 * WINDOWS_RELATIVE * np.abs(even).max(), "twin: other weights"


@pytest.mark.parametrize(("at_once", "guidance_scale"), [(2, 1.0), (3, 2.0)])
def test_windows_at_once_are_windows_one_by_one(pipe: Pipeline, at_once: int, guidance_scale: float) -> None:
    how: dict[str, Any] = {"num_frames": 17, "height": 56, "output_type": "latent", "guidance_scale": guidance_scale}
    apart = pipe(PROMPT, **how, **STEPS).latents
    together = pipe(PROMPT, windows_at_once=at_once, **how, **STEPS).latents
    assert np.abs(together - apart).max() < WINDOWS_RELATIVE * np.abs(apart).max()


def test_twin_windows_that_change_places_are_seen(pipe: Pipeline) -> None:
    plan = plan_for(pipe.bundle, Windows(LARGE, at_once=2))
    whole = Generator(0).randn(plan.latent_shape)
    straight = plan.averaged(0, whole, lambda parts: np.repeat(parts, 2, axis=0))
    assert np.abs(straight - whole).max() < WINDOWS_RELATIVE
    assert np.abs(plan.averaged(0, whole, lambda parts: np.repeat(parts[::-1], 2, axis=0)) - whole).max() > 1


def test_a_larger_video_has_its_size_and_its_report_the_windows(pipe: Pipeline) -> None:
    video = pipe(PROMPT, num_frames=16, width=56, **STEPS)
    assert video.frames.shape == (1, 16, 48, 56, 3)
    assert video.latents.shape == (1, 5, 8, 6, 7)
    assert video.report.windows is not None
    assert video.report.windows.as_json["count"] == 4
    assert str(video.report.windows) == "4 windows of 9x48x48 (2 in time, 2 in width)"
    again = pipe(PROMPT, num_frames=16, width=56, **STEPS)
    assert np.array_equal(video.frames, again.frames)
    assert pipe(PROMPT, **STEPS).report.windows is None


def test_frames_come_as_they_are_decoded(pipe: Pipeline) -> None:
    pieces = [event for event in pipe.stream(PROMPT, num_frames=25, **STEPS) if isinstance(event, Frames)]
    assert [piece.start for piece in pieces] == [0, 9, 13, 17, 21]


def test_freenoise_is_the_noise_of_earlier_frames_in_another_order(pipe: Pipeline) -> None:
    plan = plan_for(pipe.bundle, Windows(Shape(33, 48, 48), overlap=4, freenoise=True))
    noise = plan.noise(Generator(3))[0]
    assert np.array_equal(noise[:3], Generator(3).randn((1, 3, 8, 6, 6))[0])
    order = [next(n for n in range(3) if np.array_equal(frame, noise[n])) for frame in noise]
    assert order[3:5] in ([0, 1], [1, 0])
    assert [sorted(order[n - 3 : n - 1]) for n in (3, 5, 7)] == [sorted(order[n : n + 2]) for n in (3, 5, 7)]
    assert not np.array_equal(noise, plan.noise(Generator(4))[0])
    plain = replace(plan, freenoise=False).noise(Generator(3))[0]
    assert not any(np.array_equal(plain[3], frame) for frame in plain[:3]), "twin: without it noise is new"


def test_a_loop_closes_where_a_video_does_not(pipe: Pipeline) -> None:
    how: dict[str, Any] = {"seed": 7, "num_inference_steps": 8}
    loop = pipe(PROMPT, num_frames=16, loop=True, **how).frames[0]
    assert loop.shape == (16, 48, 48, 3)
    neighbours = [psnr(loop[n], loop[n + 1]) for n in range(15)]
    assert psnr(loop[-1], loop[0]) > max(LOOP_PSNR, min(neighbours))
    open_ended = pipe(PROMPT, num_frames=16, **how).frames[0]
    assert psnr(open_ended[-1], open_ended[0]) < LOOP_PSNR, "twin: without it there is a jump"


def test_a_loop_has_no_first_frame_so_that_it_can_be_turned(pipe: Pipeline) -> None:
    """Latents turned by one latent frame decode to frames turned by four, but for what the VAE's past reaches over."""
    from cvx_deploy.pipeline.coding import decoded

    plan = plan_for(pipe.bundle, Windows(Shape(24, 48, 48), loop=True))
    latents = pipe(PROMPT, num_frames=24, loop=True, output_type="latent", **STEPS).latents
    request, backend = RunRequest((PROMPT,)), OrtBackend(pipe.bundle)

    def frames(clip: Latents) -> Latents:
        made = decoded(backend, request, plan, clip, SilentProgress(), RunReport())
        return np.concatenate([piece.frames for piece in made])

    straight, turned = frames(latents), frames(np.roll(latents, 1, axis=1))
    assert psnr(np.roll(straight, 4, axis=0), turned) > LOOP_PSNR
    assert psnr(straight, turned) < LOOP_PSNR, "twin"


def test_the_packaged_loop_starts_where_a_bundle_says(pipe: Pipeline) -> None:
    assert pipe(PROMPT, loop=True, **STEPS).frames.shape[1] == 12


def test_a_video_goes_on_from_a_longer_one(pipe: Pipeline) -> None:
    clip = np.random.default_rng(0).integers(0, 255, (17, 48, 56, 3)).astype(np.uint8)
    how: dict[str, Any] = {"num_frames": 17, "width": 56, "strength": 0.5, "num_inference_steps": 4}
    video = pipe(PROMPT, video=clip, **how)
    assert video.frames.shape == (1, 17, 48, 56, 3)
    other = np.concatenate([clip[:13], clip[:4]])
    assert not np.array_equal(pipe(PROMPT, video=other, **how).latents, video.latents), "its end is looked at"


def test_an_image_may_be_larger_but_not_longer(images: Pipeline) -> None:
    picture = np.random.default_rng(0).integers(0, 255, (48, 64, 3)).astype(np.uint8)
    assert images(PROMPT, image=picture, width=64, **STEPS).frames.shape == (1, 9, 48, 64, 3)
    with pytest.raises(PromptError, match="no image to start from but the first"):
        images(PROMPT, image=picture, num_frames=17, **STEPS)
    with pytest.raises(PromptError, match="a loop has no first frame"):
        images(PROMPT, image=picture, loop=True, **STEPS)


@pytest.mark.parametrize(
    "cache", [{"fast": True}, {"cache": "adaptive", "cache_tolerance": 1.0}, {"cache": "fixed", "cache_speedup": 1.5}]
)
def test_steps_are_forecast_with_windows_too(pipe: Pipeline, cache: dict[str, Any]) -> None:
    video = pipe(PROMPT, num_frames=17, num_inference_steps=8, **cache)
    assert len(video.report.steps[0].forecast) > 0
    assert np.isfinite(video.latents).all()


def test_windows_begin_at_whole_tokens_of_a_model_with_patches_in_time(exported: Exported) -> None:
    bundle = exported("1.5-5b")
    frames = 2 * bundle.shape.frames + 3
    plan = plan_for(bundle, Windows(replace(bundle.shape, frames=frames)))
    assert all(start % 2 == 0 for start in plan.frames.starts)
    assert plan.frames.length % 2 == 0
    assert plan.frames.window == plan_for(bundle, None).frames.length
    whole = Generator(0).randn(plan.latent_shape)
    assert np.abs(plan.averaged(0, whole, lambda part: part) - whole).max() < WINDOWS_RELATIVE


@pytest.mark.parametrize(
    ("wanted", "error", "said"),
    [
        ({"num_frames": 7}, ShapeError, "makes no videos of 7x48x48"),
        ({"num_frames": 17, "height": 40}, ShapeError, "makes no videos of 17x40x48"),
        ({"num_frames": 17, "height": 50}, ShapeError, "height 50 is not a multiple of 8"),
        ({"num_frames": 17, "overlap": 12}, ShapeError, "windows of 9 frames cannot share 12"),
        ({"num_frames": 17, "overlap": -1}, ShapeError, "cannot share -1"),
        ({"overlap": 4}, CvxError, "--overlap means nothing"),
        ({"freenoise": True}, CvxError, "--freenoise means nothing"),
        ({"windows_at_once": 2}, CvxError, "--windows-at-once means nothing"),
        ({"num_frames": 17, "windows_at_once": 0}, ShapeError, "0 windows at once"),
        ({"num_frames": 14, "loop": True}, ShapeError, "a loop of 14 frames"),
        ({"num_frames": 8, "loop": True}, ShapeError, "it has a multiple of 4, and 12 or more"),
        ({"num_frames": 5000}, ShapeError, "beyond 4096 frames"),
        ({"width": 96, "vae_tiling": True}, ShapeError, "not by other tiles"),
        ({"num_frames": 17, "freenoise": True, "latents": np.zeros((1, 5, 8, 6, 6), np.float32)}, PromptError, "both"),
        ({"num_frames": 17, "latents": np.zeros((1, 3, 8, 6, 6), np.float32)}, ShapeError, r"not \(5, 8, 6, 6\)"),
    ],
)
def test_what_windows_cannot_make_is_refused_before_any_step(
    pipe: Pipeline, wanted: dict[str, Any], error: type[CvxError], said: str
) -> None:
    steps: list[object] = []
    with pytest.raises(error, match=said):
        pipe(PROMPT, callback_on_step_end=steps.append, **STEPS | wanted)
    assert steps == []


def test_a_clip_for_a_loop_is_refused(pipe: Pipeline) -> None:
    with pytest.raises(PromptError, match="a loop has no first frame"):
        pipe(PROMPT, video=np.zeros((12, 48, 48, 3), np.uint8), num_frames=12, loop=True, **STEPS)


def test_of_several_shapes_the_largest_that_fits_is_the_window(exported: Exported) -> None:
    shapes = (Shape(9, 80, 112), Shape(8, 80, 112))
    bundle = exported("2b", shapes=shapes)
    inside, windows = bundle_and_windows(bundle, ShapeChoice(frames=30))
    assert (inside.shape, windows) == (shapes[0], Windows(Shape(30, 80, 112)))
    assert bundle_and_windows(bundle, ShapeChoice(frames=8)) == (bundle.at(shapes[1]), None)


def test_the_command_makes_it_and_says_how_much_work_it_is(tmp_path: Path) -> None:
    words = ("--prompt", PROMPT, "--steps", 2, "--threads", 1, "--long", "windows", "--freenoise", "--width", 56)
    kept = ("--save-latents", tmp_path / "latents.npy")
    done = cvx("run", *words, *kept, "--frames", 17, "--output", tmp_path / "long.npy", "--json")
    assert done.code == 0
    said = json.loads(done.out)
    assert (said["shape"], said["windows"]["count"]) == ("17x48x56", 4)
    assert "4 windows of 9x48x48 (2 in time, 2 in width), each at every step: 2 steps, 8 passes" in done.err
    again = cvx("run", "--from-latents", tmp_path / "latents.npy", "--threads", 1, "--output", tmp_path / "again.npy")
    assert again.code == 0
    assert (tmp_path / "again.npy").read_bytes() == (tmp_path / "long.npy").read_bytes()
