"""Modules that run on engines and are called as diffusers' and transformers' own are."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput, Transformer2DModelOutput
from transformers.modeling_outputs import BaseModelOutput

from cvx_deploy.engines.backend import Backend, DeviceTensor
from cvx_deploy.errors import CvxError, PromptError
from cvx_deploy.exporters.dropin.views import Views, in_torch, on_engine, video_frames
from cvx_deploy.pipeline import vae

MOST_AT_ONCE = 2
"""Samples of a run: both halves of guidance. Compiled engines take no more, and more of them run one after another."""
_OFS = 2.0  # what diffusers' pipelines give


class StandIn(torch.nn.Module):
    """What every stand-in has of the network whose place it takes: its config, and a type and device that can move."""

    anchor: torch.Tensor

    def __init__(self, plain: Any, views: Views) -> None:
        super().__init__()
        self.config = plain.config
        self._views = views
        self.register_buffer("anchor", torch.empty(0, dtype=plain.dtype, device=plain.device), persistent=False)
        self.eval()

    @property
    def dtype(self) -> torch.dtype:
        """The type that it takes and puts out."""
        return self.anchor.dtype

    @property
    def device(self) -> torch.device:
        """Where it takes and puts out tensors."""
        return self.anchor.device


class TextEncoder(StandIn):
    """In the place of ``T5EncoderModel``."""

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, return_dict: bool = True
    ) -> Any:
        """Return the embeddings (B, S, D) of token ids (B, S).

        Raises:
            PromptError: They are of another length than the bundle was exported for, or a mask hides some.
        """
        length = self._views.bundle.manifest.text_length
        if input_ids.shape[1] != length:
            raise PromptError(
                f"{input_ids.shape[1]} tokens, and the bundle was exported for {length}",
                fix=f"call the pipeline with max_sequence_length={length}",
            )
        if attention_mask is not None and not bool(attention_mask.all()):
            raise PromptError("the engine's text encoder takes no attention mask", fix="leave attention_mask out")
        backend = self._views.first()
        like = self.anchor
        with backend.load("text_encoder", {"batch": 1}) as session:
            pieces = [
                in_torch(backend, session.run({"input_ids": on_engine(ids)})["prompt_embeds"], like)
                for ids in torch.split(input_ids.to(torch.int64), 1)
            ]
        embeds = torch.cat(pieces)
        return BaseModelOutput(last_hidden_state=embeds) if return_dict else (embeds,)


class Transformer(StandIn):
    """In the place of ``CogVideoXTransformer3DModel``; what the modulation network says of a timestep is kept."""

    def __init__(self, plain: Any, views: Views) -> None:
        super().__init__(plain, views)
        self._modulation: dict[tuple[int, float], DeviceTensor] = {}

    def cache_context(self, name: str) -> AbstractContextManager[None]:
        """Give what diffusers' pipelines enter around a call; only its caches look at the name."""
        return nullcontext()

    def enable_cache(self, config: Any) -> None:
        """Refuse: the blocks lie in a graph.

        Raises:
            CvxError: Always.
        """
        raise CvxError("diffusers' caches hook into blocks, which an engine has none of", fix="leave enable_cache out")

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        timestep: torch.Tensor | float,
        timestep_cond: torch.Tensor | None = None,
        ofs: torch.Tensor | float | None = None,
        image_rotary_emb: object = None,
        attention_kwargs: Mapping[str, Any] | None = None,
        return_dict: bool = True,
    ) -> Any:
        """Return the prediction, (B, F, C, H, W), of latents and prompt embeddings (B, S, D).

        Args:
            hidden_states: (B, F, C, H, W); of image-to-video models with the image's latents as further channels.
            encoder_hidden_states: The prompts' embeddings.
            timestep: One, or one a sample.
            timestep_cond: No CogVideoX model has one.
            ofs: What 1.5-5b-i2v takes.
            image_rotary_emb: Not looked at: the graph has the tables of its shape.
            attention_kwargs: Empty, or a LoRA's scale, which without a LoRA means nothing.
            return_dict: Whether to return diffusers' output class or a tuple.

        Raises:
            ShapeError: The bundle has no graph for latents of that size.
            CvxError: Something that the graph does not take.
        """
        if timestep_cond is not None or set(attention_kwargs or ()) - {"scale"}:
            raise CvxError("the engine takes no timestep_cond and no attention_kwargs", fix="leave them out")
        backend = self._views.of_latents(tuple(hidden_states.shape[1:]))
        steps = torch.as_tensor(timestep).flatten().tolist()
        steps = steps * len(hidden_states) if len(steps) == 1 else steps
        given = _OFS if ofs is None else float(torch.as_tensor(ofs).flatten()[0])
        pieces = []
        for start, end in _pieces(steps):
            rows = self._rows(backend, steps[start], given)
            with backend.load("transformer", {"batch": end - start}) as session:
                inputs = {
                    "hidden_states": on_engine(hidden_states[start:end].float()),
                    "encoder_hidden_states": on_engine(encoder_hidden_states[start:end].float()),
                    "modulation": rows,
                }
                pieces.append(in_torch(backend, session.run(inputs)["noise_pred"], hidden_states))
        sample = torch.cat(pieces)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def _rows(self, backend: Backend, timestep: float, ofs: float) -> DeviceTensor:
        if timestep != int(timestep):
            raise CvxError(f"timestep {timestep} is no whole number", fix="use a scheduler of CogVideoX")
        key = int(timestep), ofs
        if key not in self._modulation:
            inputs: dict[str, Any] = {"timestep": np.array([key[0]], np.int64)}
            if self._views.bundle.manifest.traits.ofs:
                inputs["ofs"] = np.array([ofs], np.float32)
            with backend.load("modulation", {}) as session:
                self._modulation[key] = backend.to_host(session.run(inputs)["modulation"])
        return self._modulation[key]


def _pieces(steps: list[float]) -> list[tuple[int, int]]:
    """Cut a batch into runs of neighbours at one timestep: where each starts and ends."""
    cuts: list[tuple[int, int]] = []
    start = 0
    while start < len(steps):
        end = start + 1
        while end < min(len(steps), start + MOST_AT_ONCE) and steps[end] == steps[start]:
            end += 1
        cuts.append((start, end))
        start = end
    return cuts


class Vae(StandIn):
    """In the place of ``AutoencoderKLCogVideoX``; one video at a time, as diffusers does sliced."""

    def __init__(self, plain: Any, views: Views) -> None:
        super().__init__(plain, views)
        self.use_tiling, self.use_slicing = bool(plain.use_tiling), True
        self._check_tiles(plain.tile_sample_min_height, plain.tile_sample_min_width)

    def enable_tiling(
        self, tile_sample_min_height: int | None = None, tile_sample_min_width: int | None = None
    ) -> None:
        """Work tile by tile, with the bundle's tiles.

        Raises:
            CvxError: Tiles of another size.
        """
        self._check_tiles(tile_sample_min_height, tile_sample_min_width)
        self.use_tiling = True

    def disable_tiling(self) -> None:
        """Work at whole frames."""
        self.use_tiling = False

    def enable_slicing(self) -> None:
        """Nothing changes: videos are always worked through one by one, and a batch would give the same values."""

    def disable_slicing(self) -> None:
        """See `enable_slicing`."""

    def encode(self, x: torch.Tensor, return_dict: bool = True) -> Any:
        """Return the distribution of the latents of clips (B, 3, F, H, W) in [-1, 1].

        Raises:
            ShapeError: The bundle has no encoder for such clips.
        """
        known, cut = self._views.bundle.manifest.vae, self._views.bundle.family.vae
        half, (_, _, frames, height, width) = cut.encoder(known), x.shape
        whole = frames if frames > 1 else self._views.bundle.shape.frames  # an image is of a video's first frame
        backend = self._views.of_clip(half, frames, (height, width), whole=whole)
        if self.use_tiling:
            cut.check_tiles(known, half, backend.bundle.shape)
        clips = [clip.detach().float().cpu().numpy() for clip in torch.split(x, 1)]
        moments = [vae.moments(backend, clip, tiled=self.use_tiling, advance=_silent) for clip in clips]
        posterior = DiagonalGaussianDistribution(torch.from_numpy(np.concatenate(moments)).to(x.device, x.dtype))
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    def decode(self, z: torch.Tensor, return_dict: bool = True) -> Any:
        """Return clips (B, 3, F, H, W) of unscaled latents (B, C, f, h, w).

        Raises:
            ShapeError: The bundle has no decoder for them.
        """
        known, cut = self._views.bundle.manifest.vae, self._views.bundle.family.vae
        _, _, frames, height, width = z.shape
        plane = height * known.spatial, width * known.spatial
        whole = video_frames(self._views.bundle, frames)
        backend = self._views.of_clip(cut.decoder, frames, plane, whole=whole)
        if self.use_tiling:
            cut.check_tiles(known, cut.decoder, backend.bundle.shape)
        made = []
        for clip in torch.split(z, 1):
            values = clip.detach().float().cpu().numpy()
            made.append(np.concatenate([*vae.decode(backend, values, tiled=self.use_tiling, advance=_silent)], axis=2))
        sample = torch.from_numpy(np.concatenate(made)).to(z.device, z.dtype)
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def _check_tiles(self, height: int | None, width: int | None) -> None:
        known = self._views.bundle.manifest.vae
        if (height or known.tile_height, width or known.tile_width) != (known.tile_height, known.tile_width):
            raise CvxError(
                f"tiles of {height}x{width}, and the bundle's are of {known.tile_height}x{known.tile_width}",
                fix="call enable_tiling() without sizes",
            )


def _silent(_: int) -> None:
    """Tell nobody."""


STAND_INS: dict[str, type[StandIn]] = {"text_encoder": TextEncoder, "transformer": Transformer, "vae": Vae}
