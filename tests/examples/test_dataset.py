"""A dataset's faults are found before anything is encoded; what is encoded is what diffusers' networks say."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from dataset import DatasetError, Report, check_dataset, require_good
from diffusers import AutoencoderKLCogVideoX
from PIL import Image
from prepare import prepare
from safetensors.torch import load_file

from cvx_deploy.bundle.opened import Bundle
from cvx_deploy.errors import ShapeError
from cvx_deploy.media.read import load_video
from cvx_deploy.miniatures import miniature

MINI = Bundle.open(miniature("mini"))
I2V = Bundle.open(miniature("mini-i2v"))
GOOD = ({"video": "a", "caption": "a red circle grows"}, {"video": "b", "caption": "a blue square stays still"})


def write_clip(path: Path, seed: int, *, frames: int = 9, size: tuple[int, int] = (48, 48)) -> None:
    path.mkdir(parents=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (frames, *size, 3), np.uint8)
    for index, frame in enumerate(pixels):
        Image.fromarray(frame).save(path / f"{index}.png")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A sound dataset of two clips."""
    for seed, name in enumerate("ab"):
        write_clip(tmp_path / "data" / "videos" / name, seed)
    return captioned(tmp_path / "data", *GOOD)


def captioned(data: Path, *lines: object) -> Path:
    (data / "captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return data


def problem(report: Report) -> str:
    with pytest.raises(DatasetError, match="1 problems"):
        require_good(report)
    return report.problems[0]


def test_a_sound_dataset_has_no_problem_and_every_clip_a_bucket(data: Path) -> None:
    report = check_dataset(data, MINI)
    require_good(report)
    assert [checked.bucket for checked in report.clips] == [MINI.shape, MINI.shape]
    assert "2 at 9x48x48; problems: 0" in str(report)


@pytest.mark.parametrize(
    ("clip", "told"),
    [
        ({"frames": 8}, "8 frames, and 9 are needed"),
        ({"size": (40, 40)}, "40x40, which fits none of 9x48x48"),
        ({"size": (48, 96)}, "48x96, which fits none of 9x48x48"),
    ],
)
def test_a_clip_that_is_short_small_or_of_another_form_is_told(data: Path, clip: dict[str, object], told: str) -> None:
    write_clip(data / "videos" / "c", 7, **clip)  # type: ignore[arg-type]
    captioned(data, *GOOD, {"video": "c", "caption": "a red circle"})
    assert told in problem(check_dataset(data, MINI))


def test_unreadable_and_missing_clips_are_told(data: Path) -> None:
    (data / "videos" / "c.mp4").write_bytes(b"no video")
    captioned(data, *GOOD, {"video": "c.mp4", "caption": "red"}, {"video": "d.mp4", "caption": "red"})
    damaged, missing = check_dataset(data, MINI).problems
    assert damaged.startswith("line 3: ")
    assert "not a video" in damaged
    assert "d.mp4: no such file" in missing


def test_the_same_clip_twice_is_told(data: Path) -> None:
    write_clip(data / "videos" / "c", 0)
    captioned(data, *GOOD, {"video": "c", "caption": "a red circle grows"})
    assert "shows the same as line 1" in problem(check_dataset(data, MINI))


def test_a_clip_without_a_caption_is_told(data: Path) -> None:
    captioned(data, GOOD[0])
    assert "has no caption" in problem(check_dataset(data, MINI))


def test_a_caption_too_long_or_empty_is_told(data: Path) -> None:
    captioned(data, {"video": "a", "caption": "red circle " * 200}, {"video": "b", "caption": " "})
    long, empty = check_dataset(data, MINI).problems
    assert "more than 226 tokens" in long
    assert "line 2: an empty caption" in empty


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ({"video": "a"}, "line 1 is no clip"),
        ({"video": 3, "caption": "red"}, "line 1 is no clip"),
        ({"video": "../a", "caption": "red"}, "outside of the dataset"),
    ],
)
def test_a_line_that_names_no_clip_is_refused(data: Path, line: object, told: str) -> None:
    with pytest.raises(DatasetError, match=told):
        check_dataset(captioned(data, line), MINI)


def test_latents_and_embeddings_are_those_of_diffusers_and_are_made_once(data: Path, tmp_path: Path) -> None:
    """The twin is the other clip, whose latents are others."""
    clips, cache = check_dataset(data, MINI).clips, tmp_path / "cache"
    prepare(clips, MINI, MINI, cache, "onnxruntime")
    index = json.loads((cache / "index.json").read_text())
    made = [load_file(cache / clip["latents"])["mean"] for clip in index["clips"]]
    vae = AutoencoderKLCogVideoX.from_pretrained(miniature("mini"), subfolder="vae")
    pixels = torch.from_numpy(load_video(clips[0].clip.path, 9, 48, 48).pixels)
    with torch.no_grad():
        expected = vae.encode(pixels).latent_dist.mean[0].transpose(0, 1)
    assert torch.allclose(made[0], expected, atol=1e-3)
    assert not torch.allclose(made[1], expected, atol=1e-3)
    assert len(list((cache / "prompts").glob("*.safetensors"))) == 3  # two captions, and the empty one
    before = {path: path.stat().st_mtime_ns for path in cache.rglob("*.safetensors")}
    next(iter(before)).unlink()
    prepare(clips, MINI, MINI, cache, "onnxruntime")
    after = {path: path.stat().st_mtime_ns for path in cache.rglob("*.safetensors")}
    assert [path for path in after if after[path] != before[path]] == [next(iter(before))]


def test_an_image_to_video_model_takes_its_clips_from_a_bundle_with_the_same_vae(data: Path, tmp_path: Path) -> None:
    clips = check_dataset(data, I2V).clips
    with pytest.raises(ShapeError, match="encodes images, not clips"):
        prepare(clips, I2V, I2V, tmp_path / "cache", "onnxruntime")
    assert not (tmp_path / "cache").exists()
    prepare(clips, I2V, MINI, tmp_path / "cache", "onnxruntime")
    entry = json.loads((tmp_path / "cache" / "index.json").read_text())["clips"][0]
    assert load_file(tmp_path / "cache" / entry["image"])["mean"].shape == (1, 8, 6, 6)
    assert load_file(tmp_path / "cache" / entry["latents"])["mean"].shape == (3, 8, 6, 6)
