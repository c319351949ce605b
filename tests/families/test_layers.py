"""Which layers are quantized, and what can be excluded."""

from pathlib import Path

import pytest

from cvx_deploy.errors import RecipeError
from cvx_deploy.families.cogvideox.layers import quantizable
from cvx_deploy.quantize.layers import excluded_places, leader, without

NAMES = [
    "patch_embed.proj.weight",
    "patch_embed.text_proj.weight",
    "time_embedding.linear_1.weight",
    "transformer_blocks.0.norm1.linear.weight",
    "transformer_blocks.0.attn1.norm_q.weight",
    "transformer_blocks.0.attn1.to_q.weight",
    "transformer_blocks.0.attn1.to_q.bias",
    "transformer_blocks.0.attn1.to_k.weight",
    "transformer_blocks.0.attn1.to_v.weight",
    "transformer_blocks.0.attn1.to_out.0.weight",
    "transformer_blocks.10.ff.net.0.proj.weight",
    "transformer_blocks.10.ff.net.2.weight",
    "norm_out.linear.weight",
    "proj_out.weight",
]
LAYERS = quantizable("transformer", NAMES)


def test_embeddings_modulation_and_outputs_stay_as_they_are() -> None:
    assert len(LAYERS) == 6
    assert all(".attn1.to_" in layer or ".ff.net." in layer for layer in LAYERS)


def test_query_key_and_value_share_their_input() -> None:
    assert {leader(layer) for layer in LAYERS if layer[-1] in "qkv"} == {"transformer_blocks.0.attn1.to_q"}
    assert leader("encoder.block.3.layer.0.SelfAttention.v") == "encoder.block.3.layer.0.SelfAttention.q"
    assert leader("encoder.block.3.layer.1.DenseReluDense.wi_1") == "encoder.block.3.layer.1.DenseReluDense.wi_0"
    assert leader("transformer_blocks.10.ff.net.2") == "transformer_blocks.10.ff.net.2"


def test_a_block_is_excluded_and_not_the_one_whose_number_begins_alike() -> None:
    assert without(LAYERS, ["transformer_blocks.10"]) == LAYERS[:4]
    with pytest.raises(RecipeError, match=r"transformer_blocks\.1 cannot be excluded"):
        without(LAYERS, ["transformer_blocks.1"])
    with pytest.raises(RecipeError, match="every layer"):
        without(LAYERS, ["transformer_blocks"])


def test_no_words_are_no_choice_and_none_is_one() -> None:
    assert excluded_places([]) is None
    assert excluded_places(["none"]) == ()
    with pytest.raises(RecipeError, match="places and none"):
        excluded_places(["none", "transformer_blocks.0"])


def test_places_come_from_files_too(tmp_path: Path) -> None:
    file = tmp_path / "ranked.json"
    file.write_text('{"schema_version": 1, "exclude": ["transformer_blocks.0"]}')
    assert excluded_places(["proj_out", str(file), "proj_out"]) == ("proj_out", "transformer_blocks.0")
    for damaged in ("[]", "{", '{"exclude": 3}'):
        file.write_text(damaged)
        with pytest.raises(RecipeError, match=r"ranked\.json is no list"):
            excluded_places([str(file)])
