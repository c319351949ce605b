"""Python that the documentation prints: it runs as it stands there, where PyTorch cannot be imported."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cvx_deploy.miniatures import miniature
from cvx_deploy.pipeline.pipeline import Pipeline
from tests.conftest import ROOT, Exported

BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
WITHOUT_TORCH = "import sys\nsys.modules.update(dict.fromkeys(('torch', 'diffusers', 'transformers', 'onnx_ir')))\n"
BY_HAND = 1e-5
"""How far a video made by hand may be from the pipeline's: the same graphs and engine, with other session options."""


def program(page: str) -> str:
    """Return the Python of a page, all blocks as one program."""
    return "\n".join(BLOCK.findall((ROOT / page).read_text(encoding="utf-8")))


def run(text: str, folder: Path) -> "subprocess.CompletedProcess[str]":
    """Run a program in a folder, in a process that has no PyTorch."""
    command = [sys.executable, "-c", WITHOUT_TORCH + text]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(("page", "made"), [("README.md", "circle.mp4"), ("docs/python.md", "shapes-1.mp4")])
def test_the_python_of_a_page_runs_as_printed(page: str, made: str, tmp_path: Path) -> None:
    done = run(program(page), tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / made).stat().st_size


def test_readme_prints_every_step_and_the_shape_it_promises(tmp_path: Path) -> None:
    lines = run(program("README.md"), tmp_path).stdout.splitlines()
    assert lines[0] == "step 1 of 50"
    assert lines[-1] == "(1, 9, 48, 48, 3) float32"


@pytest.mark.parametrize(
    ("printed", "mistaken"), [("guidance_scale=", "guidance="), ("import Pipeline", "import Pipe"), ("mini", "moni")]
)
def test_twin_a_mistake_in_a_page_is_found(printed: str, mistaken: str, tmp_path: Path) -> None:
    text = program("README.md")
    assert printed in text
    assert run(text.replace(printed, mistaken), tmp_path).returncode != 0


def by_hand(path: Path, folder: Path, text: str) -> "np.ndarray[tuple[int, ...], np.dtype[np.float32]]":
    """Return the frames that the program of the bundle's page makes of a bundle, (frames, height, width, 3)."""
    named = 'root = Path("engines/2b")'
    assert named in text
    done = run(text.replace(named, f"root = Path({str(path)!r})"), folder)
    assert done.returncode == 0, done.stderr
    return np.asarray(np.load(folder / "frames.npy"))


def by_pipeline(path: Path) -> "np.ndarray[tuple[int, ...], np.dtype[np.float32]]":
    """Return the frames that the pipeline makes of the same noise."""
    with Pipeline.from_bundle(path) as pipe:
        noise = np.random.default_rng(7).standard_normal((1, *latents_of(pipe)), np.float32)
        video = pipe("a red circle", latents=noise, num_inference_steps=4, guidance_scale=6.0)
    return video.frames[0]


def latents_of(pipe: Pipeline) -> tuple[int, ...]:
    """Return the shape of a video's latents, (F, C, H, W)."""
    return tuple(int(size) for size in pipe.bundle.network("transformer").inputs[0].shape[1:])


def test_a_bundle_is_driven_by_hand_as_its_page_says(tmp_path: Path) -> None:
    made = by_hand(miniature("mini"), tmp_path, program("docs/bundle.md"))
    assert np.abs(made - by_pipeline(miniature("mini"))).max() < BY_HAND


def test_a_bundle_of_several_chunks_is_driven_by_hand(tmp_path: Path, exported: Exported) -> None:
    bundle = exported("2b", frames=17)
    assert bundle.has("vae_decoder_next")
    made = by_hand(bundle.path, tmp_path, program("docs/bundle.md"))
    assert np.abs(made - by_pipeline(bundle.path)).max() < BY_HAND


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ('/ vae["scaling_factor"]', '* vae["scaling_factor"]'),
        ("np.zeros((1, ", "np.ones((1, "),
        ("[negative, positive]", "[positive, negative]"),
    ],
)
def test_twin_a_step_done_otherwise_shows_in_the_video(right: str, wrong: str, tmp_path: Path) -> None:
    text = program("docs/bundle.md")
    assert right in text
    made = by_hand(miniature("mini"), tmp_path, text.replace(right, wrong))
    assert np.abs(made - by_pipeline(miniature("mini"))).max() > BY_HAND
