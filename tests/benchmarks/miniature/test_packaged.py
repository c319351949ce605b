"""The miniatures in the package: small, whole, what the exporter makes, diffusers' videos, and right about captions."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import package
import pytest
import score
from captions import meaning_of
from PIL import Image
from PIL.GifImagePlugin import GifImageFile
from world import videos_of

from cvx_deploy.bundle.opened import Bundle
from cvx_deploy.exporters.export import ExportRequest, bundle_from_checkpoint
from cvx_deploy.miniatures import MINIATURES, miniature
from cvx_deploy.progress import SilentProgress
from tests.command import cvx
from tests.tolerances import PIXELS_ABSOLUTE

SAMPLING = score.Sampling(steps=12)


@pytest.fixture(scope="module")
def pictures() -> tuple[list[str], np.ndarray]:
    """Six held-out captions, and the first frames of videos that show them."""
    scenes, captions = score.held_out_examples(6)
    return captions, (videos_of(scenes)[:, 0] * 255).round().astype(np.float32) / 255


@pytest.mark.parametrize("name", MINIATURES)
def test_a_miniature_is_a_checkpoint_of_at_most_12_megabytes_and_a_whole_bundle(name: str) -> None:
    folder = miniature(name)
    bundle = Bundle.open(folder)
    for weights in bundle.manifest.weights:
        bundle.weight_path(weights, SilentProgress())
    own = {"bundle.json", "tokenizer.json", *(network.file.path for network in bundle.manifest.networks.values())}
    checkpoint = [path for path in folder.rglob("*") if path.is_file() and path.name not in own]
    assert sum(path.stat().st_size for path in checkpoint) <= 12_000_000
    assert {"model_index.json", "README.md"} <= {path.name for path in checkpoint}


def test_what_mini_i2v_shares_with_mini_becomes_links(tmp_path: Path) -> None:
    """As it is in the package; what differs, its transformer and its manifest, stays a file."""
    first, second = (Path(shutil.copytree(miniature(name), tmp_path / name)) for name in MINIATURES)
    before = {path: path.read_bytes() for path in second.rglob("*") if path.is_file()}
    package.link_what_is_shared(second, first)
    assert {path: path.read_bytes() for path in second.rglob("*") if path.is_file()} == before

    def links(folder: Path) -> dict[Path, Path]:
        return {path.relative_to(folder): path.readlink() for path in folder.rglob("*") if path.is_symlink()}

    assert links(second) == links(miniature("mini-i2v"))
    assert Path("bundle.json") not in links(second)
    assert not links(miniature("mini"))


@pytest.mark.export
@pytest.mark.parametrize("name", MINIATURES)
def test_the_packaged_bundle_is_what_the_exporter_makes_of_the_checkpoint(name: str, tmp_path: Path) -> None:
    """When this is red, run benchmarks/miniature/package.py on the packaged checkpoint again."""
    packaged = Bundle.open(miniature(name)).manifest
    made = bundle_from_checkpoint(ExportRequest(model=name, checkpoint=miniature(name)), tmp_path / name).manifest
    assert packaged.traits == made.traits
    assert packaged.vae == made.vae
    assert packaged.scheduler == made.scheduler
    assert packaged.networks.keys() == made.networks.keys()
    for network, there in packaged.networks.items():
        now = made.networks[network]
        assert (there.inputs, there.outputs, there.state) == (now.inputs, now.outputs, now.state)
    if packaged.provenance == made.provenance:  # other versions of the tools name their nodes otherwise
        assert packaged.networks == made.networks


@pytest.mark.parametrize("name", MINIATURES)
def test_diffusers_makes_the_same_videos_of_a_miniature(name: str, pictures: tuple[list[str], np.ndarray]) -> None:
    """The twin: the video of the next caption and seed is far away."""
    captions = pictures[0][:2]
    images = pictures[1][:2] if name == "mini-i2v" else None
    ours = score.videos_from_bundle(miniature(name), captions, images, SAMPLING)
    reference = score.videos_from_diffusers(miniature(name), captions, images, SAMPLING)
    assert np.abs(ours - reference).max() < PIXELS_ABSOLUTE
    assert np.abs(ours[0] - reference[1]).max() > 100 * PIXELS_ABSOLUTE


def test_mini_i2v_begins_with_the_image_it_is_given(pictures: tuple[list[str], np.ndarray]) -> None:
    captions, images = pictures
    videos = score.videos_from_bundle(miniature("mini-i2v"), captions[:4], images[:4], SAMPLING)
    scored = score.score(videos, captions[:4], images[:4])
    others = score.score(videos, captions[:4], np.roll(images[:4], 1, axis=0))
    assert scored.first_frame_psnr is not None
    assert others.first_frame_psnr is not None
    assert scored.first_frame_psnr > max(20, others.first_frame_psnr + 3)


def test_run_without_a_bundle_makes_a_video_of_a_miniature(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = ("run", "--prompt", "a red circle moves to the right", "--steps", "2")
    done = cvx(*words, "--output", "circle.gif", "--contact-sheet", "sheet.png")
    assert done.code == 0, done.err
    assert done.out == "circle.gif\n"
    assert Image.open("sheet.png").size == (9 * 48 + 8, 48)
    Image.open("sheet.png").crop((0, 0, 48, 48)).save("first.png")
    done = cvx(*words, "--image", "first.png", "--output", "moved.gif")
    assert done.code == 0, done.err
    assert GifImageFile("moved.gif").n_frames == 9


def test_a_bundle_named_mini_in_the_engines_folder_comes_before_the_packaged_one(tmp_path: Path) -> None:
    assert cvx("inspect", "--model", "mini", "--engines-dir", tmp_path).code == 0
    (tmp_path / "mini").mkdir()
    assert (
        f"{tmp_path / 'mini'} is not a bundle" in cvx("inspect", "--model", "mini", "--engines-dir", tmp_path).failure()
    )


def test_export_of_a_miniature_needs_no_checkpoint(tmp_path: Path) -> None:
    done = cvx("export", "--model", "mini", "--engines-dir", tmp_path)
    assert done.code == 0, done.err
    here, packaged = Bundle.open(tmp_path / "mini").manifest, Bundle.open(miniature("mini")).manifest
    assert dataclasses.replace(here, weights={}, checkpoint="").networks.keys() == packaged.networks.keys()
    assert {file.sha256 for file in here.weights.values()} == {file.sha256 for file in packaged.weights.values()}


def test_every_caption_of_the_gallery_is_one_the_judge_can_read() -> None:
    import gallery

    for prompt in gallery.PROMPTS:
        assert meaning_of(prompt).keys() == {"shape", "colour", "motion"}
