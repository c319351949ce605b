"""Engines in diffusers' pipelines, held against the same pipelines on their own networks."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import CogVideoXImageToVideoPipeline, CogVideoXPipeline, CogVideoXVideoToVideoPipeline
from peft import LoraConfig
from torch.utils.dlpack import from_dlpack

from cvx_deploy.bundle.opened import Bundle
from cvx_deploy.diffusers import use_engines
from cvx_deploy.errors import CvxError, EngineError, ShapeError, WrongModelError
from cvx_deploy.exporters.dropin.views import handed_over
from tests.conftest import ROOT, Exported, Tiny
from tests.parity.corrupt import corrupted
from tests.parity.test_pipelines import PROMPT, SCHEDULERS, assert_same, gradient


def loaded(kind: Any, checkpoint: Path, scheduler: str = "dpm") -> Any:
    pipe = kind.from_pretrained(checkpoint, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = SCHEDULERS[scheduler].from_config(pipe.scheduler.config)
    return pipe


def video(pipe: Any, bundle: Bundle, **call: Any) -> Any:
    shape = bundle.shape
    if not isinstance(pipe, CogVideoXVideoToVideoPipeline):
        call["num_frames"] = shape.frames
    asked = {"num_inference_steps": 3, "height": shape.height, "width": shape.width, "output_type": "np", **call}
    if "prompt_embeds" not in asked:
        asked.setdefault("prompt", PROMPT)
    return pipe(**asked, generator=torch.Generator().manual_seed(7)).frames


def assert_unchanged(pipe: Any, bundle: Bundle, **call: Any) -> None:
    """Hold every video of a call on engines against the pipeline's own, and the latents that a callback sees."""
    seen: list[list[Any]] = []

    def watch(_: Any, index: int, timestep: torch.Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        seen[-1].append((index, int(timestep)))
        return {"latents": tensors["latents"] * 0.99}

    call["callback_on_step_end"] = watch
    seen.append([])
    expected = video(pipe, bundle, **call)
    seen.append([])
    with use_engines(pipe, bundle.path):
        found = video(pipe, bundle, **call)
    assert seen[0] == seen[1] != []
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert_same(one, other)


@pytest.mark.parametrize(
    ("name", "scheduler", "call"),
    [
        ("2b", "ddim", {"prompt": [PROMPT, "a blue square"]}),
        ("2b", "dpm", {"guidance_scale": 1.0}),
        ("5b", "dpm", {"negative_prompt": "a blue square", "use_dynamic_cfg": True}),
        ("1.5-5b", "ddim", {}),
    ],
)
def test_text_to_video_is_unchanged(
    name: str, scheduler: str, call: dict[str, Any], tiny: Tiny, exported: Exported
) -> None:
    assert_unchanged(loaded(CogVideoXPipeline, tiny(name), scheduler), exported(name), **call)


@pytest.mark.parametrize(("name", "scheduler"), [("5b-i2v", "dpm"), ("1.5-5b-i2v", "ddim")])
def test_image_to_video_is_unchanged(name: str, scheduler: str, tiny: Tiny, exported: Exported) -> None:
    pipe = loaded(CogVideoXImageToVideoPipeline, tiny(name), scheduler)
    assert_unchanged(pipe, exported(name), image=gradient(1))


def test_video_to_video_is_unchanged(tiny: Tiny, exported: Exported) -> None:
    bundle = exported("5b")
    frames = [gradient(seed) for seed in range(bundle.shape.frames)]
    pipe = loaded(CogVideoXVideoToVideoPipeline, tiny("5b"))
    assert_unchanged(pipe, bundle, video=frames, strength=0.7)


def test_given_embeddings_and_tiles_are_taken(tiny: Tiny, exported: Exported) -> None:
    bundle, pipe = exported("5b"), loaded(CogVideoXPipeline, tiny("5b"), "ddim")
    positive, negative = pipe.encode_prompt("a ball", "a blue square")
    pipe.vae.enable_tiling()
    assert_unchanged(pipe, bundle, prompt_embeds=positive, negative_prompt_embeds=negative)


def test_every_shape_of_a_bundle_is_found_by_the_tensors(tiny: Tiny, exported: Exported) -> None:
    from tests.parity.test_pipelines import TWO_SHAPES

    name, shapes = TWO_SHAPES[0]
    bundle, pipe = exported(name, shapes=shapes), loaded(CogVideoXPipeline, tiny(name))
    for shape in shapes:
        assert_unchanged(pipe, bundle.at(shape))


@pytest.mark.parametrize(
    ("component", "tensor"),
    [
        ("text_encoder", "encoder.block.0.layer.0.SelfAttention.v.weight"),
        ("transformer", "transformer_blocks.0.ff.net.2.weight"),
        ("vae", "decoder.conv_out.conv.weight"),
    ],
)
def test_a_corrupted_weight_shows_in_the_video(
    component: str, tensor: str, tiny: Tiny, exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, pipe = exported("5b"), loaded(CogVideoXPipeline, tiny("5b"))
    expected = video(pipe, bundle)[0]
    broken = corrupted(bundle, component, tensor, tmp_path)
    monkeypatch.setattr(Bundle, "open", lambda _: broken)
    with pytest.raises(WrongModelError, match=re.escape(f"its tensor {tensor} differs")):
        use_engines(pipe, bundle.path)
    monkeypatch.setattr("cvx_deploy.exporters.dropin.use.check_pipeline", lambda *_: None)
    with use_engines(pipe, bundle.path), pytest.raises(AssertionError):
        assert_same(video(pipe, bundle)[0], expected)


def test_a_corrupted_encoder_shows_in_the_video_of_an_image(
    tiny: Tiny, exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, pipe = exported("5b-i2v"), loaded(CogVideoXImageToVideoPipeline, tiny("5b-i2v"))
    expected = video(pipe, bundle, image=gradient(1))[0]
    broken = corrupted(bundle, "vae", "encoder.conv_out.conv.weight", tmp_path)
    monkeypatch.setattr(Bundle, "open", lambda _: broken)
    monkeypatch.setattr("cvx_deploy.exporters.dropin.use.check_pipeline", lambda *_: None)
    with use_engines(pipe, bundle.path), pytest.raises(AssertionError):
        assert_same(video(pipe, bundle, image=gradient(1))[0], expected)


def test_a_pipeline_in_half_precision_is_that_model_too(tiny: Tiny, exported: Exported) -> None:
    pipe = loaded(CogVideoXPipeline, tiny("5b")).to(torch.bfloat16)
    with use_engines(pipe, exported("5b").path):
        assert pipe.dtype == torch.bfloat16
        assert np.isfinite(video(pipe, exported("5b"))).all()


def test_the_networks_come_back(tiny: Tiny, exported: Exported) -> None:
    pipe = loaded(CogVideoXPipeline, tiny("5b"))
    before, config = dict(pipe.components), dict(pipe.config)
    engines = use_engines(pipe, exported("5b").path)
    stand_in = pipe.transformer
    assert stand_in is not before["transformer"]
    with pytest.raises(CvxError, match="on engines already"):
        use_engines(pipe, exported("5b").path)
    engines.close()
    engines.close()
    assert {name: part is before[name] for name, part in pipe.components.items()} == dict.fromkeys(before, True)
    assert dict(pipe.config) == config
    latents = torch.zeros(1, 3, 16, 8, 8)
    with pytest.raises((EngineError, ShapeError)):
        stand_in(latents, torch.zeros(1, 226, 32), torch.tensor([1]))


def test_another_model_is_refused(tiny: Tiny, exported: Exported) -> None:
    pipe = loaded(CogVideoXPipeline, tiny("2b"))
    whole = pipe.transformer
    with pytest.raises(WrongModelError, match="its config differs"):
        use_engines(pipe, exported("5b").path)
    assert pipe.transformer is whole


def test_a_lora_is_refused(tiny: Tiny, exported: Exported) -> None:
    pipe = loaded(CogVideoXPipeline, tiny("5b"))
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(CvxError, match=r"a LoRA is loaded.*unload_lora_weights"):
        use_engines(pipe, exported("5b").path)


def test_a_missing_shape_is_refused_with_the_command_that_adds_it(tiny: Tiny, exported: Exported) -> None:
    bundle, pipe = exported("5b"), loaded(CogVideoXPipeline, tiny("5b"))
    with (
        use_engines(pipe, bundle.path),
        pytest.raises(ShapeError, match=rf"cvx-deploy export .*--shape {bundle.shape} --shape 17x"),
    ):
        pipe(PROMPT, num_frames=17, height=bundle.shape.height, width=bundle.shape.width, num_inference_steps=1)


def test_other_tiles_and_a_lost_handle_are_refused(tiny: Tiny, exported: Exported) -> None:
    pipe = loaded(CogVideoXPipeline, tiny("5b"))
    with use_engines(pipe, exported("5b").path):
        with pytest.raises(CvxError, match="call enable_tiling"):
            pipe.vae.enable_tiling(tile_sample_min_height=8)
        with pytest.raises(CvxError, match="enable_cache"):
            pipe.transformer.enable_cache(None)


def test_tensors_are_handed_over_without_a_copy() -> None:
    tensor = torch.arange(6.0).reshape(2, 3)
    value = handed_over(tensor)
    assert value.data_ptr() == tensor.data_ptr()
    assert from_dlpack(value).data_ptr() == tensor.data_ptr()


@pytest.mark.filterwarnings("ignore")
def test_the_example_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs" / "diffusers.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {}
    exec(example, scope)
    assert np.shape(scope["video"])[1:] == (9, 48, 48, 3)
