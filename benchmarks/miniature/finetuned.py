"""What lessons to `mini` share: a dataset as a user brings it, prepared as a user does, and shorter prompts.

The dataset is checked and encoded by the scripts of examples/finetune. Only the prompts are cut to what
`text.padding_bias` allows, the same function for a sixth of the work.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import CogVideoXTransformer3DModel
from PIL import Image
from safetensors.torch import load_file, save_file
from text import padding_bias
from world import Scene, video_of

from cvx_deploy.bundle.opened import Bundle
from cvx_deploy.miniatures import miniature

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "finetune"))
from dataset import check_dataset, require_good
from prepare import prepare
from state import Run, Training
from train import train, transformer_of

__all__ = ["Run", "Training", "prepared_cache", "train", "with_padding"]


def prepared_cache(work: Path, scenes: list[Scene], captions: list[str], tokens: int) -> Path:
    """Write clips and captions, and encode them, unless that was done before; returns the cache."""
    cache, mini = work / "cache", Bundle.open(miniature("mini"))
    if not (cache / "index.json").exists():
        _write_dataset(work / "data", scenes, captions)
        report = check_dataset(work / "data", mini)
        print(report, flush=True)
        require_good(report)
        prepare(report.clips, mini, mini, cache, "onnxruntime")
    _shorten_prompts(cache, tokens)
    return cache


def _write_dataset(folder: Path, scenes: list[Scene], captions: list[str]) -> None:
    """Write what a user would bring: clips, as folders of frames, and captions."""
    lines = []
    for number, (scene, caption) in enumerate(zip(scenes, captions, strict=True)):
        clip = folder / "videos" / f"{number:04d}"
        clip.mkdir(parents=True, exist_ok=True)
        for index, frame in enumerate((video_of(scene) * 255).round().astype(np.uint8)):
            Image.fromarray(frame).save(clip / f"{index}.png")
        lines.append(json.dumps({"video": clip.name, "caption": caption}))
    (folder / "captions.jsonl").write_text("\n".join(lines) + "\n")


def _shorten_prompts(cache: Path, tokens: int) -> None:
    """Cut cached prompts to the length that `with_padding` makes up for."""
    for path in (cache / "prompts").glob("*.safetensors"):
        embeds = load_file(path)["prompt_embeds"]
        if len(embeds) > tokens:
            padding = embeds[tokens - 1 :]
            assert (padding - padding[-1]).abs().max() < 1e-4, f"{path} has more than {tokens - 1} tokens"
            save_file({"prompt_embeds": embeds[:tokens].contiguous()}, path)


def with_padding(checkpoint: Path, dtype: torch.dtype) -> CogVideoXTransformer3DModel:
    """Load a transformer that lets the last token of a short prompt stand for all its padding."""
    transformer = transformer_of(checkpoint, dtype)

    def add_bias(_: torch.nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
        _, frames, _, height, width = given["hidden_states"].shape
        bias = padding_bias(given["encoder_hidden_states"].shape[1], frames * (height // 2) * (width // 2))
        assert bias is not None
        mask = bias[0].expand(len(given["hidden_states"]), -1, -1)
        return args, given | {"attention_kwargs": {"attention_mask": mask}}

    transformer.register_forward_pre_hook(add_bias, with_kwargs=True)
    return transformer
