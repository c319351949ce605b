"""PyTorch modules of full size in 24 GB: weights stay in bf16, and a block's are converted to float32 while it runs."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from diffusers import CogVideoXTransformer3DModel
from transformers import T5EncoderModel


def text_encoder(checkpoint: Path) -> Any:
    """Return a checkpoint's T5."""
    model = T5EncoderModel.from_pretrained(checkpoint / "text_encoder", dtype=torch.bfloat16)
    return converted_late(model, model.encoder.block)


def transformer(checkpoint: Path) -> Any:
    """Return a checkpoint's transformer."""
    model = CogVideoXTransformer3DModel.from_pretrained(checkpoint / "transformer", torch_dtype=torch.bfloat16)
    return converted_late(model, model.transformer_blocks)


def converted_late(model: torch.nn.Module, blocks: Iterable[torch.nn.Module]) -> torch.nn.Module:
    """Let a model compute in float32 with the weights of its blocks in bf16: the values are the same."""
    within = {id(weight) for block in blocks for weight in block.parameters()}
    for weight in model.parameters():
        if id(weight) not in within:
            weight.data = weight.data.float()
    for block in blocks:
        stored: dict[int, torch.Tensor] = {}

        def convert(module: torch.nn.Module, *_: Any, stored: dict[int, torch.Tensor] = stored) -> None:
            for weight in module.parameters():
                stored[id(weight)] = weight.data
                weight.data = weight.data.float()

        def restore(module: torch.nn.Module, *_: Any, stored: dict[int, torch.Tensor] = stored) -> None:
            for weight in module.parameters():
                weight.data = stored.pop(id(weight))

        block.register_forward_pre_hook(convert)
        block.register_forward_hook(restore)
    return model
