"""Tiles that diffusers does not join to the frame again are refused before any work."""

from pathlib import Path
from typing import Any

import pytest

from cvx_deploy.errors import ShapeError
from cvx_deploy.families.cogvideox.models import MODELS
from cvx_deploy.families.cogvideox.vae import DECODER, Vae, check_tiles, encoder
from cvx_deploy.shape import Shape
from tests.command import cvx


def vae(height: int, width: int) -> Vae:
    return Vae(0.7, False, 16, 8, 4, height, width)


@pytest.mark.parametrize("model", MODELS.values(), ids=lambda model: model.name)
def test_the_published_models_tiles_join(model: Any) -> None:
    facts = vae(240, 360)
    for half in (DECODER, encoder(facts)):
        check_tiles(facts, half, Shape(model.frames, model.height, model.width))


@pytest.mark.parametrize(
    ("height", "width"),
    [(24, 24), (40, 40), (8, 8), (1, 1)],  # 24: a stride of 2 latents is 16 pixels, and 20 of each tile are kept
)
def test_tiles_that_do_not_join_are_refused(height: int, width: int) -> None:
    facts = vae(height, width)
    with pytest.raises(ShapeError, match="leave out --vae-tiling"):
        check_tiles(facts, DECODER, Shape(9, 48, 48))


def test_twin_a_frame_that_is_one_tile_is_whatever_the_tiles_are() -> None:
    check_tiles(vae(24, 24), DECODER, Shape(9, 24, 24))
    check_tiles(vae(48, 40), DECODER, Shape(9, 48, 48))


def test_the_packaged_miniature_is_refused_before_it_denoises(tmp_path: Path) -> None:
    line = cvx("run", "--prompt", "x", "--vae-tiling", "--output", tmp_path / "video.npy").failure()
    assert "tiles of 24x24 do not join to a height of 48" in line
    assert not list(tmp_path.iterdir())
