"""The Python API: the command line's videos, steps and frames as they come, and refusals before any work."""

import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import cvx_deploy
from cvx_deploy import Pipeline
from cvx_deploy.bundle.opened import Bundle
from cvx_deploy.engines.onnxruntime import backend as ort
from cvx_deploy.errors import CvxError, EngineError, MediaError, PromptError, ShapeError
from cvx_deploy.miniatures import miniature
from cvx_deploy.pipeline.events import Denoised, Frames, Step
from tests.command import cvx

PROMPT = "a red circle moves to the right"
STEPS: dict[str, Any] = {"num_inference_steps": 3}


def test_a_video_is_that_of_the_command_line_to_the_bit(pipe: Pipeline, tmp_path: Path) -> None:
    video = pipe(PROMPT, seed=7, **STEPS)
    words = ("--prompt", PROMPT, "--seed", 7, "--steps", 3, "--threads", 1)
    assert cvx("run", *words, "--output", tmp_path / "out.npy").code == 0
    assert video.frames.dtype == np.float32
    assert video.frames.shape == (1, 9, 48, 48, 3)
    assert np.array_equal(video.frames[0], np.load(tmp_path / "out.npy").reshape(video.frames.shape[1:]))
    assert (video.fps, video.seeds) == (8, (7,))


def test_twin_another_seed_is_another_video(pipe: Pipeline) -> None:
    assert not np.array_equal(pipe(PROMPT, seed=7, **STEPS).frames, pipe(PROMPT, seed=8, **STEPS).frames)


def test_what_is_saved_is_what_run_writes(pipe: Pipeline, tmp_path: Path) -> None:
    video = pipe([PROMPT, "a blue square"], seed=7, **STEPS)
    assert video.save(tmp_path / "out.png.npy") == (tmp_path / "out.png.npy",)
    assert video.save(str(tmp_path / "v.mp4")) == (tmp_path / "v-0.mp4", tmp_path / "v-1.mp4")
    assert np.array_equal(np.load(tmp_path / "out.png.npy").reshape(video.frames.shape), video.frames)
    frame = video.images()[1][8]
    assert np.abs(np.asarray(frame) / 255 - video.frames[1, 8]).max() < 0.6 / 255


def test_the_defaults_are_those_that_the_bundle_states(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = [event for event in pipe.stream(PROMPT, seed=1) if isinstance(event, Step)]
    assert len(steps) == pipe.bundle.manifest.defaults.steps == 50
    assert np.array_equal(
        pipe(PROMPT, seed=1, **STEPS).frames, pipe(PROMPT, seed=1, guidance_scale=2.0, **STEPS).frames
    )


def test_a_stream_yields_steps_then_latents_then_frames(pipe: Pipeline) -> None:
    events = list(pipe.stream(PROMPT, num_videos_per_prompt=2, seed=3, **STEPS))
    assert [(event.video, event.index, event.count) for event in events if isinstance(event, Step)] == [
        (video, index, 3) for video in range(2) for index in range(3)
    ]
    kinds = [type(event) for event in events]
    assert kinds == [Step] * 6 + [Denoised] + [Frames] * (len(kinds) - 7)
    frames = [event for event in events if isinstance(event, Frames)]
    whole = pipe(PROMPT, num_videos_per_prompt=2, seed=3, **STEPS).frames
    for event in frames:
        assert np.array_equal(whole[event.video, event.start : event.start + len(event.frames)], event.frames)


def test_the_callback_sees_every_step_and_what_it_raises_ends_the_run(pipe: Pipeline) -> None:
    seen: list[int] = []
    pipe(PROMPT, callback_on_step_end=lambda step: seen.append(step.index), **STEPS)
    assert seen == [0, 1, 2]

    def stop(step: Step) -> None:
        raise KeyError(step.index)

    with pytest.raises(KeyError, match="0"):
        pipe(PROMPT, callback_on_step_end=stop, **STEPS)
    assert pipe(PROMPT, **STEPS).frames.shape[0] == 1, "it can be used on"


def test_a_stream_that_is_closed_frees_the_pipeline_at_any_event(pipe: Pipeline) -> None:
    expected = pipe(PROMPT, seed=2, **STEPS).frames
    for wanted in range(5):
        stream = pipe.stream(PROMPT, seed=2, **STEPS)
        for _ in range(wanted + 1):
            next(stream)
        stream.close()
    assert np.array_equal(pipe(PROMPT, seed=2, **STEPS).frames, expected)


def test_a_second_run_meanwhile_is_refused_from_any_thread(pipe: Pipeline) -> None:
    stream = pipe.stream(PROMPT, **STEPS)
    next(stream)
    failures: list[BaseException] = []

    def second() -> None:
        try:
            pipe(PROMPT, **STEPS)
        except CvxError as error:
            failures.append(error)

    thread = threading.Thread(target=second)
    thread.start()
    thread.join()
    with pytest.raises(CvxError, match="is making a video"):
        pipe.close()
    stream.close()
    assert "is making a video" in str(failures[0])


def test_networks_are_loaded_once_for_all_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []
    session = ort.OrtSession.__init__

    def noted(self: Any, name: str, *rest: Any) -> None:
        loaded.append(name)
        session(self, name, *rest)

    monkeypatch.setattr(ort.OrtSession, "__init__", noted)
    for residency, times in (("resident", 1), ("phase", 2)):
        loaded.clear()
        with Pipeline.from_pretrained("mini", threads=1, residency=residency) as pipeline:
            videos = [pipeline(PROMPT, seed=5, **STEPS).frames for _ in range(2)]
        assert np.array_equal(videos[0], videos[1])
        assert sorted(loaded) == sorted(["text_encoder", "modulation", "transformer", "vae_decoder_first"] * times), (
            residency
        )


def test_latents_and_embeddings_take_the_place_of_seed_and_prompt(pipe: Pipeline) -> None:
    plain = pipe(PROMPT, seed=4, **STEPS)
    noise = np.random.default_rng(0).standard_normal(plain.latents.shape).astype(np.float32)
    one, other = pipe(PROMPT, latents=noise, seed=4, **STEPS), pipe(PROMPT, latents=noise, seed=5, **STEPS)
    assert np.array_equal(one.frames, other.frames), "DDIM draws nothing after the noise"
    assert not np.array_equal(one.frames, plain.frames)
    bundle = pipe.bundle
    _, length, width = bundle.network("text_encoder").outputs[0].shape
    embeds = np.zeros((1, int(length), int(width)), np.float32)
    made = pipe(prompt_embeds=embeds, negative_prompt_embeds=embeds, seed=4, **STEPS)
    assert not np.array_equal(made.frames, plain.frames)


def test_generators_are_seeds_one_for_each_video(pipe: Pipeline) -> None:
    import torch

    video = pipe(PROMPT, num_videos_per_prompt=2, generator=[9, torch.Generator().manual_seed(3)], **STEPS)
    assert video.seeds == (9, 3)
    assert np.array_equal(video.frames[1:], pipe(PROMPT, seed=3, **STEPS).frames)


def test_latents_alone_are_not_decoded(pipe: Pipeline) -> None:
    video = pipe(PROMPT, output_type="latent", seed=4, **STEPS)
    assert video.frames.shape == (1, 0, 48, 48, 3)
    assert np.array_equal(video.latents, pipe(PROMPT, seed=4, **STEPS).latents)


def test_an_image_is_the_same_as_a_file_a_picture_and_an_array(images: Pipeline, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (48, 48, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    forms = [tmp_path / "image.png", str(tmp_path / "image.png"), Image.fromarray(pixels), pixels]
    videos = [images(PROMPT, image=form, **STEPS).frames for form in forms]
    assert all(np.array_equal(videos[0], video) for video in videos[1:])
    floats = images(PROMPT, image=pixels.astype(np.float32) / 255, **STEPS).frames
    assert np.abs(floats - videos[0]).max() < 1e-5


def test_a_clip_is_the_same_as_a_folder_and_an_array(pipe: Pipeline, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (9, 48, 48, 3), np.uint8)
    for number, frame in enumerate(pixels):
        Image.fromarray(frame).save(tmp_path / f"{number:04}.png")
    if not pipe.bundle.has("vae_encoder"):
        pytest.skip("the miniature does not start from videos")
    one, other = (pipe(PROMPT, video=form, strength=0.9, **STEPS).frames for form in (tmp_path, pixels))
    assert np.array_equal(one, other)


@pytest.mark.parametrize(
    ("wanted", "error", "said"),
    [
        ({"image": np.zeros((48, 48, 3), np.uint8)}, PromptError, "takes no image"),
        ({"strength": 0.5}, PromptError, "means nothing without"),
        ({"num_frames": 7}, ShapeError, "makes no videos of 7x48x48"),
        ({"output_type": "pt"}, CvxError, "output_type 'pt'"),
        ({"guidance_scale": float("nan")}, CvxError, "guidance scale nan"),
        ({"generator": [1, 2]}, CvxError, "2 seeds for 1 videos"),
        ({"latents": np.zeros((2, 3, 16, 6, 6), np.float32)}, CvxError, "latents of 2 videos"),
        ({"latents": np.zeros((1, 4, 16, 6, 6), np.float32)}, ShapeError, "noise for a video has the shape"),
        ({"prompt_embeds": np.zeros((1, 2, 2), np.float32)}, PromptError, "beside prompt_embeds"),
        ({"num_inference_steps": 0}, CvxError, "steps"),
    ],
)
def test_what_makes_no_sense_is_refused_before_any_step(
    pipe: Pipeline, wanted: dict[str, Any], error: type[CvxError], said: str
) -> None:
    steps: list[Step] = []
    with pytest.raises(error, match=said):
        pipe(PROMPT, callback_on_step_end=steps.append, **STEPS | wanted)
    assert steps == []


def test_embeddings_of_another_model_are_refused(pipe: Pipeline) -> None:
    with pytest.raises(PromptError, match=r"not .* \(tokens, channels\)"):
        pipe(prompt_embeds=np.zeros((1, 2, 2), np.float32), **STEPS)


def test_pictures_that_are_none_are_refused(images: Pipeline, tmp_path: Path) -> None:
    for image in (np.zeros((4, 4), np.uint8), np.full((48, 48, 3), 2.0), np.zeros((8, 8, 3), np.float32)):
        with pytest.raises(MediaError):
            images(PROMPT, image=image, **STEPS)
    with pytest.raises(MediaError):
        images(PROMPT, image=tmp_path / "none.png", **STEPS)


def test_engines_and_their_options_are_checked_when_it_is_opened() -> None:
    with pytest.raises(EngineError, match="there is no engine 'tpu'"):
        Pipeline.from_pretrained("mini", engine="tpu")
    with pytest.raises(EngineError, match="vram means nothing"):
        Pipeline.from_pretrained("mini", vram=10**9)
    with pytest.raises(EngineError, match="devices means nothing"):
        Pipeline.from_pretrained("mini", devices=(0, 1))


def test_a_pipeline_that_is_closed_says_so() -> None:
    pipeline = Pipeline.from_pretrained("mini")
    pipeline.close()
    with pytest.raises(CvxError, match="is closed"):
        pipeline(PROMPT)


def test_two_shapes_of_a_bundle_take_turns(exported: Any) -> None:
    from cvx_deploy.shape import Shape

    bundle: Bundle = exported("2b", shapes=(Shape(9, 80, 112), Shape(8, 80, 112)))
    with Pipeline.from_bundle(bundle.path, threads=1) as pipeline:
        sizes = [pipeline(PROMPT, num_frames=n, num_inference_steps=1).frames.shape[1] for n in (8, 9, 8)]
    assert sizes == [8, 9, 8]


def test_the_public_names_are_few_and_import_nothing_heavy() -> None:
    program = """
import json, sys
import cvx_deploy
early = sorted(name for name in ("numpy", "onnxruntime", "click", "torch") if name in sys.modules)
from cvx_deploy import Pipeline, Video
late = "torch" in sys.modules
print(json.dumps([early, late]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [[], False]
    assert set(cvx_deploy.__all__) == {"Pipeline", "Video", "__version__"}
    assert miniature("mini").is_dir()
