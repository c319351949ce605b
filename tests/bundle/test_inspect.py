"""A bundle in words says what is in the manifest, all of it that a person needs."""

from dataclasses import replace
from pathlib import Path

import pytest

from cvx_deploy.bundle.inspect import describe
from cvx_deploy.bundle.opened import Bundle
from tests.bundle.test_bundle import make_bundle


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return make_bundle(tmp_path)


def test_the_words_name_model_shape_precision_and_scheduler(bundle: Bundle) -> None:
    first, second, *_ = describe(bundle).splitlines()
    assert first == "5b: text-to-video, rope positions, 9x80x112, 17x80x112 at 8 fps"
    assert second == "precision fp32; scheduler dpm; 226 text tokens"


def test_the_words_name_every_network_with_its_inputs_and_outputs(bundle: Bundle) -> None:
    lines = describe(bundle).splitlines()
    assert "vae  vae.onnx  19 bytes  fp32" in lines
    assert "  in   pixels  float32  BCFHW (1, 3, 9, 8*latent_height, 8*latent_width)" in lines


def test_causal_caches_are_counted_rather_than_listed(bundle: Bundle) -> None:
    text = describe(bundle)
    assert "  and 1 causal cache, handed from one chunk to the next" in text
    assert "new_cache" not in text


def test_the_words_say_where_every_weight_file_lies_and_its_hash(bundle: Bundle) -> None:
    lines = describe(bundle).splitlines()
    for name, place in (("in", "in the bundle"), ("vae.out", f"in {bundle.manifest.checkpoint}")):
        entry = bundle.manifest.weights[name]
        assert f"  {name}  {entry.size} bytes  {place}  sha256 {entry.sha256[:12]}" in lines


def test_the_words_end_with_the_tools(bundle: Bundle) -> None:
    assert describe(bundle).splitlines()[-1] == "made with cvx-deploy 0.1.0"


@pytest.mark.parametrize(
    ("size", "words"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (999_900, "1 MB"),
        (1500, "1.5 kB"),
        (2_340_000, "2.34 MB"),
        (11_100_000_000, "11.1 GB"),
    ],
)
def test_sizes_are_in_units_a_person_reads(bundle: Bundle, size: int, words: str) -> None:
    weights = {"in": replace(bundle.manifest.weights["in"], size=size)}
    changed = Bundle(bundle.path, replace(bundle.manifest, weights=weights))
    assert f"  in  {words}  in the bundle" in describe(changed)
