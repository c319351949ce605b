"""Observing diffusers' sampler, and finding out what the transformer is sensitive to."""

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import diffusers
import numpy as np
import pytest
import torch
from transformers import T5EncoderModel, T5Tokenizer

from cvx_deploy.errors import CalibrationError, PromptError, ShapeError
from cvx_deploy.exporters.quantization import calibrate as module
from cvx_deploy.exporters.quantization.calibrate import CalibrationRequest, calibrate
from cvx_deploy.exporters.quantization.observe import Observations
from cvx_deploy.exporters.quantization.sensitivity import draw, sensitivity
from cvx_deploy.exporters.reference.streamed import streamed_network
from cvx_deploy.exporters.sources.checkpoint import Checkpoint
from cvx_deploy.families.cogvideox.layers import quantizable
from cvx_deploy.miniatures import miniature
from cvx_deploy.progress import SilentProgress
from cvx_deploy.quantize.layers import leader
from cvx_deploy.quantize.prompts import read_prompts
from cvx_deploy.quantize.recipe import NetworkPrecision
from cvx_deploy.quantize.table import CalibrationTable
from cvx_deploy.shape import Shape
from tests.conftest import Tiny

PROMPTS = ("a red ball", "a cat in the rain")


def request_of(checkpoint: Path, **more: Any) -> CalibrationRequest:
    found = Checkpoint(checkpoint)
    shape = Shape(9, found.limits.sample_height, found.limits.sample_width)
    return CalibrationRequest(found, shape, PROMPTS, steps=3, **more)


@pytest.fixture(scope="module")
def made(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> tuple[CalibrationRequest, CalibrationTable]:
    request = request_of(tiny("5b"), compute="fp32")
    return request, calibrate(request, tmp_path_factory.mktemp("table") / "table", SilentProgress())


def test_ranges_are_those_of_diffusers_own_pipeline(made: tuple[CalibrationRequest, CalibrationTable]) -> None:
    request, table = made
    seen: dict[str, torch.Tensor] = {}
    root = request.checkpoint.root
    pipeline: Any = diffusers.CogVideoXPipeline.from_pretrained(
        root,
        text_encoder=T5EncoderModel.from_pretrained(root / "text_encoder", dtype=torch.float32),
        tokenizer=T5Tokenizer.from_pretrained(root / "tokenizer"),
        torch_dtype=torch.float32,
    )
    pipeline.set_progress_bar_config(disable=True)
    layers = quantizable("transformer", request.checkpoint.tensors("transformer"))

    def watch(layer: str) -> Any:
        def hook(_: Any, given: tuple[torch.Tensor, ...]) -> None:
            largest = given[0].abs().amax((0, 1))
            seen[layer] = torch.maximum(seen[layer], largest) if layer in seen else largest

        return hook

    for layer in layers:
        pipeline.transformer.get_submodule(layer).register_forward_pre_hook(watch(layer))
    for index, prompt in enumerate(PROMPTS):
        pipeline(
            prompt,
            height=request.shape.height,
            width=request.shape.width,
            num_frames=9,
            num_inference_steps=3,
            generator=torch.Generator().manual_seed(index),
            output_type="latent",
            max_sequence_length=pipeline.transformer.config.max_text_seq_length,
        )
    for layer in layers:
        np.testing.assert_allclose(table.amax[layer], seen[layer].numpy(), rtol=1e-4)
        assert np.array_equal(table.amax[layer], table.amax[leader(layer)])
    assert table.amax["transformer_blocks.0.attn1.query"].shape == (16,)
    assert any(place.startswith("text_encoder/encoder.block.1.") for place in table.amax)
    assert table.conditions.observed == (0, 1, 2)


def stop(request: CalibrationRequest, output: Path) -> None:
    """Begin a calibration, and end it before its second prompt."""
    sample = module.Sampler.sample

    def one(self: module.Sampler, index: int, *words: Any) -> None:
        if index == 1:
            raise KeyboardInterrupt
        sample(self, index, *words)

    with mock.patch.object(module.Sampler, "sample", one), pytest.raises(KeyboardInterrupt):
        calibrate(request, output, SilentProgress())
    assert not output.exists()


def test_a_stopped_calibration_goes_on_and_ends_the_same(
    made: tuple[CalibrationRequest, CalibrationTable], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request, whole = made
    output = tmp_path / "table"
    stop(request, output)
    sample, seen = module.Sampler.sample, []

    def note(self: module.Sampler, index: int, *words: Any) -> None:
        seen.append(index)
        sample(self, index, *words)

    monkeypatch.setattr(module.Sampler, "sample", note)
    table = calibrate(request, output, SilentProgress())
    assert seen == [1]
    assert table.conditions == whole.conditions
    assert all(np.array_equal(table.amax[place], whole.amax[place]) for place in whole.amax)
    assert [file.name for file in tmp_path.iterdir()] == ["table"]


def test_second_moments_are_those_of_what_comes_in(tiny: Tiny, tmp_path: Path) -> None:
    request = replace(request_of(tiny("5b"), compute="fp32", second_moments=True), prompts=PROMPTS[:1], steps=1)
    table = calibrate(request, tmp_path / "table", SilentProgress())
    layer, given = "transformer_blocks.1.ff.net.2", []
    observations = Observations()
    with torch.inference_mode():
        (embeds,) = module.encode(request, observations, 0, SilentProgress())
        with module.sampler(request, observations) as sampling:
            place = sampling.transformer.get_submodule(layer)
            place.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0].double().numpy()))
            sampling.sample(0, embeds, lambda _: None)
    (tokens,), text = given, request.checkpoint.configs["transformer"]["max_text_seq_length"]
    words, video = (part.reshape(-1, tokens.shape[-1]) for part in np.split(tokens, [text], 1))
    expected = 0.1 * words.T @ words / len(words) + video.T @ video / len(video)
    found = table.moments[layer]
    assert found.shape == (5, 64, 64)
    for index, stretch in enumerate(found):
        part = slice(64 * index, 64 * (index + 1))
        np.testing.assert_allclose(stretch, expected[part, part], rtol=1e-3, atol=1e-4 * expected.max())
    assert not np.allclose(found[0], expected[64:128, 64:128], rtol=0.1), "the twin"
    assert set(table.moments) == {leader(place) for place in table.moments}
    assert CalibrationTable.read(tmp_path / "table").conditions.second_moments


def test_moments_of_a_stopped_calibration_are_added_up(tiny: Tiny, tmp_path: Path) -> None:
    request = replace(request_of(tiny("5b"), compute="fp32", second_moments=True), steps=1)
    whole = calibrate(request, tmp_path / "whole", SilentProgress())
    stop(request, tmp_path / "table")
    calibrate(request, tmp_path / "table", SilentProgress())
    assert (tmp_path / "table").read_bytes() == (tmp_path / "whole").read_bytes()
    assert len(whole.moments) == 12


def test_other_conditions_start_anew(
    made: tuple[CalibrationRequest, CalibrationTable], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request, whole = made
    whole.write(tmp_path / ".table.partial")
    table = calibrate(replace(request, prompts=PROMPTS[:1], seed=5), tmp_path / "table", SilentProgress())
    assert table.conditions.prompt_count == 1
    assert table.conditions.seed == 5


def test_activations_that_are_no_numbers_are_named(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = streamed_network

    def broken(checkpoint: Checkpoint, component: str, *words: Any) -> Any:
        network = stream(checkpoint, component, *words)
        if component == "transformer":
            network.transformer_blocks[1].register_forward_pre_hook(
                lambda _, given, words: (given, {**words, "hidden_states": words["hidden_states"] * torch.nan}),
                with_kwargs=True,
            )
        return network

    monkeypatch.setattr(module, "streamed_network", broken)
    with pytest.raises(CalibrationError, match=r"transformer_blocks\.1\.attn1\.to_[qkv] stopped being numbers"):
        calibrate(request_of(tiny("5b")), tmp_path / "table", SilentProgress())
    assert not (tmp_path / "table").exists()


def test_image_to_video_is_calibrated_with_an_image(tiny: Tiny, tmp_path: Path) -> None:
    request = replace(request_of(tiny("5b-i2v")), prompts=PROMPTS[:1], steps=1)
    assert calibrate(request, tmp_path / "table", SilentProgress()).conditions.observed == (0,)
    with pytest.raises(CalibrationError, match="takes no image"):
        request_of(tiny("5b"), image=tmp_path / "image.png")


def test_blocks_have_weights_only_while_they_run(tiny: Tiny) -> None:
    network = streamed_network(Checkpoint(tiny("5b")), "text_encoder", torch.float32, torch.device("cpu"))
    held = []
    for block in network.encoder.block:
        block.register_forward_pre_hook(
            lambda *_: held.append(sum(next(one.parameters()).device.type == "cpu" for one in network.encoder.block))
        )
    with torch.inference_mode():
        network(torch.zeros(1, 4, dtype=torch.int64))
    assert held == [1, 1]
    assert {parameter.device.type for parameter in network.encoder.block.parameters()} == {"meta"}


def test_prompts_that_are_not_there_are_refused(tmp_path: Path, tiny: Tiny) -> None:
    (tmp_path / "empty").write_text("\n  \n")
    with pytest.raises(PromptError, match="holds no prompts"):
        read_prompts(tmp_path / "empty")
    with pytest.raises(PromptError, match="cannot be read"):
        read_prompts(tmp_path / "none")
    with pytest.raises(PromptError, match="asked for 65"):
        read_prompts(count=65)
    with pytest.raises(ShapeError):
        CalibrationRequest(Checkpoint(tiny("5b")), Shape(9, 81, 112), PROMPTS)


def test_the_ranking_leads_to_exclusions_that_reach_the_target(
    made: tuple[CalibrationRequest, CalibrationTable], tmp_path: Path
) -> None:
    request, table = made
    precision = NetworkPrecision("fp32", "int8")
    plain = sensitivity(request, precision, table, SilentProgress())
    errors = [one.relative_l2 for one in plain.ranking]
    assert errors == sorted(errors, reverse=True)
    assert len(errors) == 3
    assert plain.exclude == ()
    asked = sensitivity(request, precision, table, SilentProgress(), by="layer", min_psnr=plain.psnr_of_all + 1)
    assert asked.psnr >= plain.psnr_of_all + 1 > asked.psnr_of_all
    assert set(asked.exclude) == {one.place for one in asked.ranking[: len(asked.exclude)]}
    assert b"<svg" in draw(asked, tmp_path / "plot.svg").read_bytes()


@pytest.mark.nightly
def test_the_last_blocks_of_the_trained_miniature_suffer_most(tmp_path: Path) -> None:
    checkpoint = Checkpoint(miniature("mini"))
    prompts = ("a red circle moves to the right",)
    request = CalibrationRequest(checkpoint, Shape(9, 48, 48), prompts, steps=4, compute="fp32")
    table = calibrate(request, tmp_path / "table", SilentProgress())
    for scheme in ("int8", "fp8"):
        found = sensitivity(request, NetworkPrecision("fp32", scheme), table, SilentProgress())
        ranked = [one.place for one in found.ranking]
        assert set(ranked[:2]) == {"transformer_blocks.6", "transformer_blocks.7"}
        assert "transformer_blocks.0" in ranked[-2:]


def test_more_bits_hurt_less(made: tuple[CalibrationRequest, CalibrationTable]) -> None:
    request, table = made
    psnr = {
        scheme: sensitivity(request, NetworkPrecision("fp32", scheme), table, SilentProgress()).psnr_of_all
        for scheme in ("int8wo", "int8", "int4wo")
    }
    assert psnr["int8wo"] > psnr["int8"] > psnr["int4wo"]
