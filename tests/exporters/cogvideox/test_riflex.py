"""RIFLEx: one frequency of time is lowered as the paper says, and a bundle made so is diffusers with that change."""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from diffusers.models import embeddings

from cvx_deploy.bundle.schema import Riflex
from cvx_deploy.errors import ShapeError
from cvx_deploy.exporters.cogvideox.riflex import check_riflex, riflex_for
from cvx_deploy.exporters.cogvideox.transformer import TransformerContract
from cvx_deploy.exporters.reference.longer_rope import rope_of
from cvx_deploy.exporters.sources.synth_configs import transformer_config
from cvx_deploy.families.cogvideox.models import MODELS
from cvx_deploy.shape import Shape
from tests.command import cvx
from tests.conftest import Exported, Tiny
from tests.parity.test_networks import transformer_error
from tests.tolerances import NETWORK_RELATIVE

LONG = Shape(97, 480, 720)


@contextmanager
def lowered_in_diffusers(place: int, frequency: float, channels: int) -> Iterator[None]:
    """Let diffusers compute its rotary table anew for time, with one frequency changed, as the authors' code does."""
    plain = embeddings.get_1d_rotary_pos_embed

    def changed(dim: int, pos: Any, **words: Any) -> Any:
        if dim != channels:
            return plain(dim, pos, **words)
        frequencies = 1.0 / (10000.0 ** (torch.arange(0, dim, 2)[: dim // 2].float() / dim))
        frequencies[place] = frequency
        angles = torch.outer(pos, frequencies)
        return angles.cos().repeat_interleave(2, dim=1), angles.sin().repeat_interleave(2, dim=1)

    with mock.patch.object(embeddings, "get_1d_rotary_pos_embed", changed):
        yield


def tables(config: dict[str, Any], shape: Shape, *, riflex: bool) -> dict[str, Any]:
    return TransformerContract(config, "fp32", shape, 8, 4, riflex=riflex).constants()


@pytest.mark.parametrize(("model", "frames", "tokens"), [("5b", 97, 25), ("1.5-5b", 161, 21)])
def test_the_second_frequency_of_the_published_models_is_lowered_as_in_diffusers(
    model: str, frames: int, tokens: int
) -> None:
    config, shape = transformer_config(MODELS[model], "full"), Shape(frames, 480, 720)
    found, plain = (tables(config, shape, riflex=riflex) for riflex in (True, False))
    with lowered_in_diffusers(1, 0.9 * 2 * math.pi / tokens, 16):
        theirs = tables(config, shape, riflex=False)
    for name, table in found.items():
        assert np.abs(table - theirs[name]).max() < NETWORK_RELATIVE, name
        assert (np.abs(plain[name] - theirs[name]).max() > NETWORK_RELATIVE) == name.endswith(".t"), f"twin: {name}"
    assert np.array_equal(np.delete(found["cos.t"], [2, 3], axis=1), np.delete(plain["cos.t"], [2, 3], axis=1))


def test_the_longer_video_lies_within_one_period() -> None:
    config = transformer_config(MODELS["5b"], "full")
    angle = np.arctan2(*(tables(config, LONG, riflex=True)[name][:, 2] for name in ("sin.t", "cos.t")))
    turned = np.unwrap(angle)
    assert np.all(np.diff(turned) > 0)
    assert turned[-1] < 0.9 * 2 * math.pi
    plain = np.arctan2(*(tables(config, LONG, riflex=False)[name][:, 2] for name in ("sin.t", "cos.t")))
    assert np.unwrap(plain)[-1] > 2 * math.pi, "twin: without it positions come again"


def test_a_length_within_the_period_is_left_as_it_is() -> None:
    config = transformer_config(MODELS["5b"], "full")
    assert riflex_for(config, 19) is None
    assert riflex_for(config, 20) is not None
    shape = Shape(49, 480, 720)
    assert np.array_equal(tables(config, shape, riflex=True)["cos.t"], tables(config, shape, riflex=False)["cos.t"])


@pytest.mark.parametrize(
    ("model", "tokens", "said", "fix"),
    [
        ("2b", 25, "no rotary positions", "leave out --riflex"),
        ("5b", 13, "positions repeat after 19.9 tokens", "--frames 81"),
        ("1.5-5b", 11, "positions repeat after 19.9 tokens", "--frames 153"),
    ],
)
def test_where_it_changes_nothing_it_is_refused(model: str, tokens: int, said: str, fix: str) -> None:
    config = transformer_config(MODELS[model], "full")
    with pytest.raises(ShapeError, match=said) as caught:
        check_riflex(config, {"some": tokens})
    assert fix in caught.value.fix


def test_the_frames_that_it_advises_need_it() -> None:
    for model, frames in (("5b", 81), ("1.5-5b", 153)):
        config = transformer_config(MODELS[model], "full")
        assert TransformerContract(config, "fp32", Shape(frames, 480, 720), 8, 4, riflex=True).riflex is not None
        assert TransformerContract(config, "fp32", Shape(frames - 8, 480, 720), 8, 4, riflex=True).riflex is None


def test_what_check_compares_with_has_the_same_change() -> None:
    config, bundle = transformer_config(MODELS["5b"], "full"), mock.Mock()
    bundle.network.return_value.riflex = Riflex(2, 25)
    with rope_of(bundle):
        theirs = tables(config, LONG, riflex=False)
    for name, table in tables(config, LONG, riflex=True).items():
        assert np.abs(table - theirs[name]).max() < NETWORK_RELATIVE, name


@pytest.mark.export
def test_a_bundle_made_with_it_is_diffusers_transformer_with_the_same_change(
    tiny: Tiny, exported: Exported, tmp_path: Path
) -> None:
    bundle = exported("5b", only="transformer", frames=25, riflex=True)
    with lowered_in_diffusers(0, 0.9 * 2 * math.pi / 7, 4):
        assert transformer_error(bundle, tiny("5b"), 2) < NETWORK_RELATIVE
    assert transformer_error(bundle, tiny("5b"), 2) > NETWORK_RELATIVE, "twin: diffusers without it"
    said = json.loads((bundle.path / "bundle.json").read_text())
    assert said["networks"]["transformer"]["riflex"] == {"component": 1, "tokens": 7}
    assert "--riflex" in bundle.remedy
    assert "frequency 1 lowered" in cvx("inspect", "--bundle", bundle.path).out
    words = ("--model", "5b", "--checkpoint", tiny("5b"), "--output", tmp_path / "new", "--riflex", "--frames", 17)
    assert "positions repeat after 6.28 tokens" in cvx("export", *words).failure()
    assert not (tmp_path / "new").exists()
