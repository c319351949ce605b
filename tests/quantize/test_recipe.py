"""What the text after ``--precision`` means."""

import pytest

from cvx_deploy.errors import RecipeError
from cvx_deploy.families.cogvideox.layers import spared_blocks
from cvx_deploy.quantize.recipe import Recipe


@pytest.mark.parametrize(
    ("text", "transformer", "text_encoder", "vae"),
    [
        ("fp32", "fp32", "fp32", "fp32"),
        ("int8", "int8/bf16", "int8wo/bf16", "bf16"),
        ("int8/fp32", "int8/fp32", "int8wo/fp32", "fp32"),
        ("fp8/fp16", "fp8/fp16", "int8wo/fp16", "fp16"),
        ("transformer=fp8,text_encoder=int8wo,vae=fp16", "fp8/bf16", "int8wo/bf16", "fp16"),
        ("fp32,transformer=int4wo", "int4wo/fp32", "fp32", "fp32"),
    ],
)
def test_a_recipe_says_what_each_network_is_in(text: str, transformer: str, text_encoder: str, vae: str) -> None:
    recipe = Recipe.parse(text, "bf16")
    assert [str(recipe.of(name)) for name in ("transformer", "text_encoder", "vae")] == [transformer, text_encoder, vae]


@pytest.mark.parametrize("text", ["fp32", "int8/fp32", "fp8/bf16", "transformer=fp8/bf16,text_encoder=bf16,vae=fp16"])
def test_a_recipe_is_written_as_it_is_read(text: str) -> None:
    recipe = Recipe.parse(text, "bf16")
    assert str(recipe) == text
    assert Recipe.parse(str(recipe), "fp16") == recipe


@pytest.mark.parametrize(
    "text", ["", "int9", "int8/int8", "fp32/fp16", "unet=fp8", "fp8,int8", "vae=int8", "transformer=fp8,transformer"]
)
def test_a_recipe_that_makes_no_sense_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="makes no sense"):
        Recipe.parse(text, "bf16")


def test_the_last_of_every_16_blocks_is_spared_where_activations_are_rounded() -> None:
    assert list(spared_blocks("int8", 42)) == list(spared_blocks("fp8", 42)) == [40, 41]
    assert list(spared_blocks("int8", 30)) == [29]
    assert not spared_blocks("int8", 8)
    assert not spared_blocks("int8wo", 42)
    assert not spared_blocks("int4wo", 42)
