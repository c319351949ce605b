"""Planted outliers: they are where papers find them, and nothing else of a checkpoint changes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel
from safetensors.torch import load_file

from cvx_deploy.exporters.quantization.observe import Observations, observed
from cvx_deploy.exporters.sources import synth
from cvx_deploy.exporters.sources.outliers import outliers_of
from cvx_deploy.exporters.sources.synth_configs import transformer_config
from cvx_deploy.families.cogvideox.layers import quantizable
from cvx_deploy.families.cogvideox.models import MODELS

BLOCK = "transformer_blocks.1"


def weights_in(checkpoint: Path, component: str) -> dict[str, torch.Tensor]:
    files = (checkpoint / component).glob("*.safetensors")
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return two checkpoints of one seed: without outliers, and with."""
    root = tmp_path_factory.mktemp("pair")
    return synth.synthesize("5b", "tiny", root / "plain"), synth.synthesize("5b", "tiny", root / "with", outliers=True)


def inputs(state: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Return the largest magnitude of each channel of what the tiny 5b's layers take."""
    with torch.device("meta"):
        network = CogVideoXTransformer3DModel.from_config(transformer_config(MODELS["5b"], "tiny"))
    network.load_state_dict({name: tensor.float() for name, tensor in state.items()}, assign=True)
    seen = Observations()
    seen.seen = True
    random = torch.Generator().manual_seed(0)
    with torch.inference_mode(), observed(network, quantizable("transformer", state), "", seen):
        network(
            torch.randn(1, 3, 16, 10, 14, generator=random),
            torch.randn(1, 226, 40, generator=random),
            torch.tensor([500]),
            image_rotary_emb=(torch.ones(105, 16), torch.zeros(105, 16)),
        )
    return seen.amax


def reach(amax: dict[str, Any], place: str) -> float:
    """Return the largest channel over the one in the middle."""
    channels = torch.from_numpy(amax[f"{BLOCK}.{place}"])
    return float(channels.max() / channels.median())


def test_activations_have_outliers_and_without_the_option_have_none(pair: tuple[Path, Path]) -> None:
    plain, planted = (inputs(weights_in(checkpoint, "transformer")) for checkpoint in pair)
    for place, least in (("attn1.to_q", 6), ("ff.net.0.proj", 6), ("ff.net.2", 10), ("attn1.to_out.0", 3)):
        assert reach(planted, place) > least
        assert reach(plain, place) < 3
    places = [f"transformer_blocks.{block}.attn1.to_q" for block in range(3)]
    largest = [{*planted[place].argsort()[-2:].tolist()} for place in places]
    assert largest[0] == largest[1] == largest[2], "the same channels in every block"
    assert not all({*plain[place].argsort()[-2:].tolist()} == largest[0] for place in places)


def test_what_has_no_outliers_is_as_it_was(pair: tuple[Path, Path]) -> None:
    for component in ("transformer", "text_encoder", "vae"):
        plain, planted = (weights_in(checkpoint, component) for checkpoint in pair)
        assert plain.keys() == planted.keys()
        for name, tensor in plain.items():
            changed = outliers_of(component, name, tuple(tensor.shape), 0) is not None
            assert torch.equal(tensor, planted[name]) != changed, name
        assert (component == "vae") == all(torch.equal(tensor, planted[name]) for name, tensor in plain.items())


@pytest.mark.parametrize("outliers", [False, True])
def test_a_network_drawn_in_memory_has_the_checkpoints_weights(pair: tuple[Path, Path], outliers: bool) -> None:
    network = synth.network_on_meta("transformer", transformer_config(MODELS["5b"], "tiny"))
    state = synth.random_state(network, "transformer", 0, outliers)
    stored, others = weights_in(pair[outliers], "transformer"), weights_in(pair[not outliers], "transformer")
    assert state.keys() == stored.keys()
    assert all(torch.equal(tensor.to(stored[name].dtype), stored[name]) for name, tensor in state.items())
    assert any(not torch.equal(tensor.to(others[name].dtype), others[name]) for name, tensor in state.items())
