"""A run is at the shape that is asked for, or that the latents fit; when there is none, that is said."""

from pathlib import Path

import numpy as np
import pytest

from cvx_deploy.bundle.opened import Bundle
from cvx_deploy.errors import ShapeError
from cvx_deploy.pipeline.shapes import ShapeChoice, bundle_at, latent_shape, padding
from cvx_deploy.shape import Shape
from tests.bundle.test_bundle import make_bundle

SHORT, LONG = Shape(9, 80, 112), Shape(17, 80, 112)


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    """Return a bundle of the shapes `SHORT` and `LONG`."""
    return make_bundle(tmp_path)


@pytest.mark.parametrize(
    ("wanted", "shape"),
    [
        (ShapeChoice(), SHORT),
        (ShapeChoice(frames=17), LONG),
        (ShapeChoice(height=80), SHORT),
        (ShapeChoice(17, 80, 112), LONG),
        (ShapeChoice(frames=9, width=112), SHORT),
    ],
)
def test_the_first_shape_that_is_wanted_is_taken(bundle: Bundle, wanted: ShapeChoice, shape: Shape) -> None:
    assert bundle_at(bundle, wanted).shape == shape


@pytest.mark.parametrize(
    ("wanted", "shape"),
    [(ShapeChoice(frames=25), "25x80x112"), (ShapeChoice(17, 96), "17x96x112")],
)
def test_a_shape_that_is_not_there_is_stated_with_the_command_that_adds_it(
    bundle: Bundle, wanted: ShapeChoice, shape: str
) -> None:
    with pytest.raises(ShapeError, match=rf"no videos of {shape} \(it makes 9x80x112, 17x80x112\)") as failure:
        bundle_at(bundle, wanted)
    assert failure.value.fix.startswith("run: cvx-deploy export --model 5b")
    assert f"--shape 9x80x112 --shape 17x80x112 --shape {shape}" in failure.value.fix


def test_a_size_of_nothing_is_stated_with_what_there_is(bundle: Bundle) -> None:
    with pytest.raises(ShapeError, match=r"no videos of 9x80x0 \(it makes") as failure:
        bundle_at(bundle, ShapeChoice(width=0))
    assert failure.value.fix == "use one of these sizes"


def kept(folder: Path, *shape: int) -> Path:
    """Write latents of a shape (videos, F, C, H, W)."""
    np.save(folder / "kept.npy", np.zeros(shape, np.float32))
    return folder / "kept.npy"


@pytest.mark.parametrize(("frames", "shape"), [(3, SHORT), (5, LONG)])
def test_latents_say_which_shape_they_are_of(bundle: Bundle, tmp_path: Path, frames: int, shape: Shape) -> None:
    path = kept(tmp_path, 2, frames, 16, 10, 14)
    assert bundle_at(bundle, ShapeChoice(), path).shape == shape
    assert bundle_at(bundle, ShapeChoice(frames=shape.frames), path).shape == shape


def test_latents_of_a_shape_that_is_not_there_are_refused_by_name(bundle: Bundle, tmp_path: Path) -> None:
    what = r"kept.npy holds latents of 8x80x112, and .*bundle makes 9x80x112, 17x80x112"
    with pytest.raises(ShapeError, match=what) as failure:
        bundle_at(bundle, ShapeChoice(), kept(tmp_path, 1, 2, 16, 10, 14))
    assert "--shape 8x80x112" in failure.value.fix


def test_latents_of_another_shape_than_the_one_asked_for_are_refused(bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(ShapeError, match=r"kept.npy holds latents of 9x80x112, not of 17x80x112"):
        bundle_at(bundle, ShapeChoice(frames=17), kept(tmp_path, 1, 3, 16, 10, 14))


@pytest.mark.parametrize("shape", [(1, 3, 8, 10, 14), (3,)])
def test_what_is_no_latents_of_this_model_is_left_to_the_reader(
    bundle: Bundle, tmp_path: Path, shape: tuple[int, ...]
) -> None:
    assert bundle_at(bundle, ShapeChoice(frames=17), kept(tmp_path, *shape)).shape == LONG


def test_latents_are_of_the_shape_the_bundle_is_seen_at(bundle: Bundle) -> None:
    assert latent_shape(bundle) == (1, 3, 16, 10, 14)
    assert latent_shape(bundle.at(LONG)) == (1, 5, 16, 10, 14)
    assert padding(bundle) == 0
