"""The 3D causal VAE, cut into chunks: an encoder's and a decoder's first chunk, and the steady ones that follow.

diffusers' `AutoencoderKLCogVideoX` decodes in chunks of 2 latent frames and encodes in chunks of 8 video frames,
whatever its ratio; what is left over goes with the first chunk. It carries the last frames of every causal
convolution over. GroupNorm sees one chunk at a time, so the chunks are part of the numerics. Here every chunk is one
network over the same weights, and the carried frames are its explicit state. Of the carried tensors only those of
convolutions with a temporal kernel are ever read; the rest is left out.

Height and width are symbols (in latents), so that one graph serves the whole frame and every tile size.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import AutoencoderKLCogVideoX
from diffusers.models.autoencoders.autoencoder_kl_cogvideox import (
    CogVideoXDecoder3D,
    CogVideoXEncoder3D,
    CogVideoXResnetBlock3D,
    CogVideoXSafeConv3d,
)

from cvx_deploy.bundle.schema import DType, TensorSpec
from cvx_deploy.exporters.tracing.contract import NetworkContract
from cvx_deploy.exporters.tracing.copies import Kinds
from cvx_deploy.precision import Precision

Cache = dict[str, Any]
_STATE_TYPES: dict[Precision, DType] = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


class PlainConv3d(torch.nn.Conv3d):
    """A convolution in one piece: diffusers' own splits large inputs by a Python test that a trace would bake in."""


def flatten_cache(cache: Cache, path: str = "") -> dict[str, torch.Tensor]:
    """Return diffusers' nested cache as a dict by dotted path, without that of 1x1x1 convolutions: it is not read."""
    flat: dict[str, torch.Tensor] = {}
    for name, value in cache.items():
        if isinstance(value, dict):
            flat |= flatten_cache(value, f"{path}{name}.")
        elif name not in ("conv_y", "conv_b"):
            flat[path + name] = value
    return flat


def nest_cache(flat: dict[str, torch.Tensor]) -> Cache:
    """Undo `flatten_cache`."""
    nested: Cache = {}
    for path, value in flat.items():
        *parents, name = path.split(".")
        inner = nested
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[name] = value
    return nested


class VaeChunk(torch.nn.Module):
    """One chunk through the encoder or the decoder.

    Args:
        coder: The encoder or the decoder.
        before: A 1x1x1 convolution that precedes it (``post_quant_conv``), if the checkpoint has one.
        after: One that follows it (``quant_conv``).
        cache_names: The state it reads, empty for a first chunk.
        keep_cache: Whether a chunk follows.
    """

    def __init__(
        self,
        coder: CogVideoXEncoder3D | CogVideoXDecoder3D,
        before: torch.nn.Module | None,
        after: torch.nn.Module | None,
        cache_names: tuple[str, ...],
        keep_cache: bool,
    ) -> None:
        super().__init__()
        self.coder = coder
        self.before = before
        self.after = after
        self.cache_names = cache_names
        self.keep_cache = keep_cache

    def forward(self, *sample_and_caches: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Take a chunk ``(B, C, F, H, W)`` and the state; return its output in float32, then the next chunk's state.

        State passes in the type the network computes in: it never leaves the engine.
        """
        sample, *caches = sample_and_caches
        dtype = next(self.coder.parameters()).dtype
        sample = sample.to(dtype)
        if self.before is not None:
            sample = self.before(sample)
        state = nest_cache({name: cache.to(dtype) for name, cache in zip(self.cache_names, caches, strict=True)})
        output, cache = self.coder(sample, conv_cache=state or None)
        if self.after is not None:
            output = self.after(output)
        kept = flatten_cache(cache).values() if self.keep_cache else ()
        return (output.float(), *(tensor.to(dtype) for tensor in kept))


class VaeContract(NetworkContract):
    """Contract of one chunk of the VAE.

    Args:
        config: ``vae/config.json``.
        precision: What it computes in.
        name: vae_encoder, vae_encoder_next, vae_decoder_first or vae_decoder_next.
        frames: Frames of the chunk: video frames for an encoder, latent frames for a decoder.
        last: Whether no chunk follows, so that no state is kept.
    """

    component = "vae"

    def __init__(self, config: dict[str, Any], precision: Precision, name: str, frames: int, last: bool) -> None:
        super().__init__(config, precision)
        self.name = name
        self.frames = frames
        self.last = last
        self.encodes = name.startswith("vae_encoder")
        self.continues = name.endswith("_next")
        self.spatial = 2 ** (len(config["block_out_channels"]) - 1)
        self._cache_shapes = self._probe()

    @property
    def input_specs(self) -> tuple[TensorSpec, ...]:
        """Pixels in [-1, 1] or unscaled latents, then the state of the chunk before."""
        channels = self.config["in_channels"] if self.encodes else self.config["latent_channels"]
        name, scale = ("pixels", self.spatial) if self.encodes else ("latents", 1)
        sample = TensorSpec(name, "float32", (1, channels, self.frames, *self._plane(scale)), "BCFHW")
        return (sample, *(self._state_spec("cache", path) for path in self._read))

    @property
    def output_specs(self) -> tuple[TensorSpec, ...]:
        """Moments (mean, log-variance) or pixels, then the state for the next chunk."""
        temporal = int(self.config["temporal_compression_ratio"])
        if self.encodes:
            name, scale, channels = "moments", 1, 2 * self.config["latent_channels"]
            frames = -(-self.frames // temporal)  # each halving keeps the odd frame
        else:
            name, scale, channels = "pixels", self.spatial, self.config["out_channels"]
            frames = self.frames * temporal if self.frames % 2 == 0 else (self.frames - 1) * temporal + 1
        sample = TensorSpec(name, "float32", (1, channels, frames, *self._plane(scale)), "BCFHW")
        return (sample, *(self._state_spec("new_cache", path) for path in self._written))

    @property
    def state(self) -> dict[str, str]:
        """Which output becomes which input of the next chunk."""
        return {f"cache.{path}": f"new_cache.{path}" for path in self._written}

    def build(self) -> torch.nn.Module:
        """Return the chunk."""
        config = {key: value for key, value in self.config.items() if not key.startswith("_")}
        vae = AutoencoderKLCogVideoX.from_config(config)
        for module in vae.modules():
            if isinstance(module, CogVideoXSafeConv3d):
                module.__class__ = PlainConv3d
        coder, before, after = (
            (vae.encoder, None, vae.quant_conv) if self.encodes else (vae.decoder, vae.post_quant_conv, None)
        )
        return VaeChunk(coder, before, after, self._read, not self.last)

    def traceable(self) -> torch.nn.Module:
        """Return the chunk, which runs one residual block of each kind only and marks the others as its copies."""
        module, kinds = self.module(), Kinds()
        module.register_forward_pre_hook(lambda *_: kinds.clear())
        for path, block in module.named_modules():
            if isinstance(block, CogVideoXResnetBlock3D):
                block.forward = _marked(block, path, kinds)
        return module

    def weight_names(self, parameter: str) -> tuple[str, ...]:
        """Return the diffusers name of a parameter."""
        part, _, rest = parameter.partition(".")
        parts = {"coder": "encoder" if self.encodes else "decoder", "before": "post_quant_conv", "after": "quant_conv"}
        return (f"{parts[part]}.{rest}",)

    @property
    def _read(self) -> tuple[str, ...]:
        return tuple(self._cache_shapes) if self.continues else ()

    @property
    def _written(self) -> tuple[str, ...]:
        return () if self.last else tuple(self._cache_shapes)

    def _plane(self, scale: int) -> tuple[str, str]:
        return tuple(f"{scale}*{axis}" if scale > 1 else axis for axis in ("latent_height", "latent_width"))  # type: ignore[return-value]

    def _state_spec(self, prefix: str, path: str) -> TensorSpec:
        channels, frames, scale = self._cache_shapes[path]
        dtype = _STATE_TYPES[self.precision]
        return TensorSpec(f"{prefix}.{path}", dtype, (1, channels, frames, *self._plane(scale)), "BCFHW")

    def _probe(self) -> dict[str, tuple[int, int, int]]:
        """Return channels, frames and scale (cells a latent spans there) of every cache, by a run without data."""
        if self.last and not self.continues:
            return {}
        config = {key: value for key, value in self.config.items() if not key.startswith("_")}
        with torch.device("meta"), torch.no_grad():
            vae = AutoencoderKLCogVideoX.from_config(config)
            if self.encodes:
                _, cache = vae.encoder(torch.zeros(1, config["in_channels"], 9, 2 * self.spatial, 2 * self.spatial))
            else:
                _, cache = vae.decoder(torch.zeros(1, config["latent_channels"], 3, 2, 2))
        return {
            path: (tensor.shape[1], tensor.shape[2], tensor.shape[3] // 2)
            for path, tensor in flatten_cache(cache).items()
        }


def _marked(block: CogVideoXResnetBlock3D, path: str, kinds: Kinds) -> Callable[..., tuple[torch.Tensor, Cache]]:
    """Return a residual block's ``forward`` for a trace; of what it keeps, only what is read."""
    forward: Callable[..., tuple[torch.Tensor, Cache]] = block.forward

    def marked(
        inputs: torch.Tensor, temb: None = None, zq: torch.Tensor | None = None, conv_cache: Cache | None = None
    ) -> tuple[torch.Tensor, Cache]:
        state = flatten_cache(conv_cache or {})
        tensors: Sequence[torch.Tensor] = (inputs, *(() if zq is None else (zq,)), *state.values())
        first, tensors = kinds.enter(block, path, tensors)
        if first:
            inputs, *others = tensors
            zq = others.pop(0) if zq is not None else None
            output, cache = forward(inputs, temb, zq, nest_cache(dict(zip(state, others, strict=True))))
            tensors = kinds.leave(path, (output, *flatten_cache(cache).values()))
        output, *kept = tensors
        return output, dict(zip(("conv1", "conv2"), kept, strict=True))

    return marked
