"""Whole videos of fine-tuned checkpoints against diffusers: adapters it fuses, and a transformer trained in full."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import CogVideoXPipeline, CogVideoXTransformer3DModel

from cvx_deploy.exporters.export import ExportRequest, bundle_from_checkpoint
from tests.conftest import Exported, Tiny
from tests.exporters.sources.test_lora import ATTENTION, WIDER, matrices, written
from tests.parity.test_pipelines import Video, assert_same, diffusers, ours


def fusing(loras: list[tuple[Path, float]]) -> type:
    """Return a pipeline class that fuses adapters as it is loaded."""

    class Fused(CogVideoXPipeline):  # type: ignore[misc]
        @classmethod
        def from_pretrained(cls, *arguments: Any, **options: Any) -> CogVideoXPipeline:
            pipe = CogVideoXPipeline.from_pretrained(*arguments, **options)
            names = [path.stem for path, _ in loras]
            for name, (path, _) in zip(names, loras, strict=True):
                pipe.load_lora_weights(path.parent, weight_name=path.name, adapter_name=name)
            pipe.set_adapters(names, [scale for _, scale in loras])
            pipe.fuse_lora()
            return pipe

    return Fused


def tuned(folder: Path) -> type:
    """Return a pipeline class that takes its transformer from a folder."""

    class Tuned(CogVideoXPipeline):  # type: ignore[misc]
        @classmethod
        def from_pretrained(cls, *arguments: Any, **options: Any) -> CogVideoXPipeline:
            transformer = CogVideoXTransformer3DModel.from_pretrained(folder, **options)
            return CogVideoXPipeline.from_pretrained(*arguments, transformer=transformer, **options)

    return Tuned


def assert_another(found: Video, expected: Video) -> None:
    with pytest.raises(AssertionError):
        assert_same(found, expected)


def test_a_video_with_two_adapters_matches_diffusers(tiny: Tiny, exported: Exported, tmp_path: Path) -> None:
    loras = [
        (written(tmp_path / "style.safetensors", matrices(tiny("5b"), ATTENTION, 4, 1)), 0.6),
        (written(tmp_path / "subject.safetensors", matrices(tiny("5b"), WIDER, 7, 2)), -0.4),
    ]
    request = ExportRequest("5b", tiny("5b"), loras=tuple(loras))
    bundle = bundle_from_checkpoint(request, tmp_path / "bundle")
    expected = diffusers(fusing(loras), bundle, tiny("5b"), "dpm", 7)
    assert_same(ours(bundle, tmp_path, seed=7), expected)
    assert_another(ours(exported("5b"), tmp_path, seed=7), expected)


def test_a_video_of_a_transformer_trained_in_full_matches_diffusers(
    tiny: Tiny, exported: Exported, tmp_path: Path
) -> None:
    transformer = CogVideoXTransformer3DModel.from_pretrained(tiny("2b") / "transformer", torch_dtype=torch.float32)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in transformer.parameters():
            weight += 0.1 * weight.std(unbiased=False) * torch.randn(weight.shape, generator=generator)
    transformer.save_pretrained(tmp_path / "checkpoint-500" / "transformer", max_shard_size="300KB")
    request = ExportRequest("2b", tiny("2b"), transformer=tmp_path / "checkpoint-500")
    bundle = bundle_from_checkpoint(request, tmp_path / "bundle")
    expected = diffusers(tuned(tmp_path / "checkpoint-500" / "transformer"), bundle, tiny("2b"), "ddim", 7)
    assert_same(ours(bundle, tmp_path, scheduler="ddim", seed=7), expected)
    assert_another(ours(exported("2b"), tmp_path, scheduler="ddim", seed=7), expected)
    assert not any(entry.in_bundle for entry in bundle.manifest.weights.values())
    assert f"--transformer {tmp_path / 'checkpoint-500' / 'transformer'}" in bundle.remedy
