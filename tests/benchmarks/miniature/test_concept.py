"""The judge names the new colour, and short prompts train the same function as long ones."""

import concept
import finetuned
import numpy as np
import pytest
import torch
from judge import verdict_on
from train import transformer_of
from world import COLOURS, video_of

from cvx_deploy.miniatures import miniature


def test_the_judge_names_the_new_colour_only_where_it_is_told_of_it() -> None:
    (scene,) = concept.concept_scenes("held-out", 1)
    video = video_of(scene)
    assert verdict_on(video, COLOURS | {concept.NAME: concept.RGB}).colour == concept.NAME
    assert verdict_on(video).colour in COLOURS


def test_training_and_scoring_see_different_scenes_in_the_new_colour() -> None:
    train, held_out = (concept.concept_scenes(split, 20) for split in ("train", "held-out"))
    assert {scene.colour for scene in (*train, *held_out)} == {concept.NAME}
    assert not {scene.path for scene in train} & {scene.path for scene in held_out}


@pytest.mark.parametrize("bias", [True, False])
def test_short_prompts_give_the_same_v_with_the_weight_of_their_padding_alone(bias: bool) -> None:
    load = finetuned.with_padding if bias else transformer_of
    full, short = transformer_of(miniature("mini"), torch.float32), load(miniature("mini"), torch.float32)
    random = torch.Generator().manual_seed(0)
    words, padding = torch.randn(1, 9, 64, generator=random), torch.randn(1, 1, 64, generator=random)
    prompts = torch.cat([words, padding.expand(-1, 217, -1)], dim=1)
    latents = torch.randn(1, 3, 8, 6, 6, generator=random)
    given = {"hidden_states": latents, "timestep": torch.tensor([700])}
    with torch.no_grad():
        expected = full(encoder_hidden_states=prompts, **given).sample
        found = short(encoder_hidden_states=prompts[:, : concept.TOKENS], **given).sample
    assert np.allclose(expected, found, atol=1e-4) == bias
