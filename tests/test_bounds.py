"""Numbers that come from a file or a user are finite and bounded before anything is computed from them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cvx_deploy.bounds import MOST_PIXELS, check_video, finite_json
from cvx_deploy.bundle.opened import MANIFEST, Bundle
from cvx_deploy.bundle.schema import TensorSpec
from cvx_deploy.errors import BundleError
from cvx_deploy.families.cogvideox.models import MODELS
from cvx_deploy.shape import Shape
from tests.bundle.test_bundle import make_bundle
from tests.command import cvx


@pytest.mark.parametrize("text", ["[NaN]", '{"a": [1e999]}', '{"a": {"b": -Infinity}}', "[" + "9" * 30 + "]"])
def test_json_with_a_number_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"finite|64 bits"):
        finite_json(text)


def test_twin_json_with_large_numbers_that_are_some_is_read() -> None:
    assert finite_json(f'{{"a": [1e300, {2**64 - 1}, true, null]}}') == {"a": [1e300, 2**64 - 1, True, None]}


def test_every_published_model_is_far_below_the_bounds() -> None:
    for model in MODELS.values():
        check_video(model.frames, model.height, model.width)
        assert 10 * model.frames * model.height * model.width < MOST_PIXELS


def put(*keys: str | int) -> Callable[[Any, Any], None]:
    """Return what sets a value in a nested object."""

    def change(where: Any, value: Any) -> None:
        for key in keys[:-1]:
            where = where[key]
        where[keys[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "value"),
    [
        (put("fps"), 10**9),
        (put("text_length"), 10**12),
        (put("vae", "latent_channels"), 10**9),
        (put("vae", "scaling_factor"), 1e300),
        (put("shapes", 0, "shape", "frames"), 8 * 10**9),
        (put("shapes", 0, "shape", "height"), 16 * 10**8),
        (put("tokenizer", "size"), 2**62),
        (put("networks", "vae", "inputs", 0, "shape", 1), 10**12),
    ],
)
def test_a_manifest_of_numbers_beyond_all_measure_is_damaged(
    tmp_path: Path, change: Callable[[Any, Any], None], value: object
) -> None:
    bundle = make_bundle(tmp_path)
    manifest = json.loads((bundle.path / MANIFEST).read_bytes())
    change(manifest, value)
    (bundle.path / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match="is damaged"):
        Bundle.read(bundle.path)


def test_a_tensors_sizes_are_bounded_as_a_whole() -> None:
    with pytest.raises(ValueError, match="values"):
        TensorSpec("x", "float32", (1 << 20, 1 << 20), "BC")


@pytest.mark.parametrize(
    "words",
    [
        ["--threads", "1000000"],
        ["--frames", str(10**30)],
        ["--shape", "9x48x1000000"],
        ["--shape", f"{10**400}x1x1"],
        ["--vram", "9" * 400, "--engine", "tensorrt"],
        ["--vram", "1" * 10 + "\u0663", "--engine", "tensorrt"],
    ],
)
def test_an_option_beyond_all_measure_is_wrong_usage(words: list[str], tmp_path: Path) -> None:
    assert cvx("run", "--prompt", "x", "--output", tmp_path / "x.npy", *words).code == 2


@pytest.mark.parametrize(
    "words", [["--num-videos", str(10**12)], ["--guidance-scale", "1e308"], ["--steps", str(10**9)]]
)
def test_a_wish_beyond_all_measure_is_one_clear_line(words: list[str], tmp_path: Path) -> None:
    cvx("run", "-q", "--prompt", "x", "--output", tmp_path / "x.npy", *words).failure()
    assert not list(tmp_path.iterdir())


def test_a_shape_is_read_up_to_the_bound() -> None:
    assert Shape.parse("4096x512x512") == Shape(4096, 512, 512)
    with pytest.raises(ValueError, match="beyond"):
        Shape.parse("4097x512x512")
