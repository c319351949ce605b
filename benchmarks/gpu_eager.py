"""PyTorch's own attention and diffusers' own transformer on a GPU: what engines are held against."""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from gpu_flops import rate

RUNS = 3


@dataclass(frozen=True)
class _Size:
    """How large the transformer is, and its latents; its default is the 5b at 49x480x720."""

    layers: int = 42
    heads: int = 48
    frames: int = 13
    height: int = 60
    width: int = 90
    text: int = 226

    @property
    def tokens(self) -> int:
        return self.text + self.frames * self.height * self.width // 4

    @property
    def flops(self) -> int:
        """Of one run at batch 2, without the first and the last layers: products, and attention."""
        width = 64 * self.heads
        return 2 * self.layers * self.tokens * (24 * width**2 + 4 * self.tokens * width)


_REHEARSED = _Size(layers=2, heads=2, frames=2, height=8, width=8, text=16)


def size_of(arguments: argparse.Namespace) -> _Size:
    """Return the size that is measured, or that a rehearsal takes."""
    return _REHEARSED if arguments.rehearse else _Size()


def seconds_of(work: Callable[[], Any], device: str, runs: int = 10) -> float:
    """Return the median seconds of something: by the GPU's own clock, of what is queued there."""
    import torch

    work()
    taken = []
    for _ in range(runs):
        if device == "cpu":
            begin = time.perf_counter()
            work()
            taken.append(time.perf_counter() - begin)
            continue
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        end.record()
        end.synchronize()
        taken.append(start.elapsed_time(end) / 1e3)
    return float(np.median(taken))


def attention(arguments: argparse.Namespace) -> dict[str, Any]:
    """Time PyTorch's attention at the size of a 5b at 49x480x720, by kernel."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    size, device = size_of(arguments), "cpu" if arguments.rehearse else "cuda"
    shape = (2, size.heads, size.tokens, 64)
    q, k, v = (torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in range(3))
    operations, found = 4 * 2 * size.heads * size.tokens**2 * 64, dict[str, Any]()
    for kernel in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
        try:
            with sdpa_kernel(kernel):
                call = torch.nn.functional.scaled_dot_product_attention
                seconds = seconds_of(lambda call=call: call(q, k, v), device, 5)  # type: ignore[misc]
            found[kernel.name] = {"seconds": seconds, **rate(operations, seconds, arguments.output)}
        except RuntimeError as error:
            found[kernel.name] = {"failed": str(error).splitlines()[0]}
    return found


def eager(arguments: argparse.Namespace) -> dict[str, Any]:
    """Time diffusers' transformer with random weights made on the device: plain, compiled by blocks, and in fp8."""
    import torch

    size, device = size_of(arguments), "cpu" if arguments.rehearse else "cuda"
    model, call = _transformer(size, device)
    found: dict[str, Any] = {}
    with torch.no_grad():
        for name, prepare in (("eager", lambda _: None), ("compiled", _compile), ("fp8", _quantize)):
            try:
                prepare(model)
                seconds = seconds_of(call, device, RUNS)
                found[name] = {"seconds": seconds, **rate(size.flops, seconds, arguments.output)}
            except (ImportError, RuntimeError, AssertionError, NotImplementedError) as error:
                found[name] = {"failed": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
            if device == "cuda":
                found[name]["peak_bytes"] = torch.cuda.max_memory_allocated()
    return found


def _transformer(size: _Size, device: str) -> tuple[Any, Callable[[], Any]]:
    """Return the model, and what runs it once at batch 2."""
    import torch
    from diffusers import CogVideoXTransformer3DModel

    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = CogVideoXTransformer3DModel(
            num_attention_heads=size.heads, num_layers=size.layers, use_rotary_positional_embeddings=True,
            sample_height=size.height, sample_width=size.width, sample_frames=4 * size.frames - 3,
            max_text_seq_length=size.text,
        ).eval()  # fmt: skip
        hidden = torch.randn(2, size.frames, 16, size.height, size.width)
        text, step = torch.randn(2, size.text, 4096), torch.full((2,), 500)
        places = (size.tokens - size.text, 64)
        rotary = (torch.randn(places, dtype=torch.float32), torch.randn(places, dtype=torch.float32))
    return model, lambda: model(hidden, text, step, image_rotary_emb=rotary, return_dict=False)


def _compile(model: Any) -> None:
    for block in model.transformer_blocks:
        block.compile()


def _quantize(model: Any) -> None:
    """Let the blocks' linear layers multiply in fp8, by torchao, scaled by rows; they are compiled already."""
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_

    quantize_(model.transformer_blocks, Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()))
