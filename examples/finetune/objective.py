"""What a step of training sees, and what it minimizes: batches of cached latents, and the error of the predicted v.

Everything random follows from the seed, the step and the process, so that a resumed run draws what it would have drawn.
"""

import json
import random
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXTransformer3DModel
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid
from safetensors.torch import load_file
from torch import Tensor

from cvx_deploy.errors import CheckpointError, CvxError
from cvx_deploy.reading import read_whole, reading

# Captions replaced by the empty one, so that guidance keeps its other branch.
_DROP_CAPTION = 0.1
_OFS = 2.0  # what the pipelines give 1.5 image-to-video


class CacheError(CvxError):
    """A cache of prepare.py that is not there, damaged, or of another model."""


@dataclass(frozen=True)
class Batch:
    """Scaled latents and conditions of clips of one bucket.

    Attributes:
        latents: (B, F, C, H, W); `noise` likewise.
        images: Latents of the first frames, zero after them, likewise; None for text-to-video.
        prompts: (B, S, D); `empty` (1, S, D), the empty prompt.
        timesteps: (B,), int64.
    """

    latents: Tensor
    noise: Tensor
    images: Tensor | None
    prompts: Tensor
    empty: Tensor
    timesteps: Tensor

    def to(self, device: torch.device) -> "Batch":
        """Return it on a device."""
        parts: dict[str, Any] = {name: None if part is None else part.to(device) for name, part in vars(self).items()}
        return Batch(**parts)


class Prepared:
    """A cache of prepare.py.

    Args:
        folder: Where it lies.

    Raises:
        CacheError: It is not there, or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.buckets: dict[str, list[dict[str, str]]] = defaultdict(list)
        fix = "run examples/finetune/prepare.py, whose last file it is"
        content = read_whole(folder / "index.json", CacheError, fix=fix)
        with reading(folder / "index.json", CacheError, fix=fix):
            index: dict[str, Any] = json.loads(content)
            self.task: str = index["task"]
            self._empty: str = index["empty"]
            self._scale = float(index["scaling_factor"])
            self._image_scale = 1 / self._scale if index["invert_scale_latents"] else self._scale
            for clip in index["clips"]:
                self.buckets[clip["shape"]].append(clip)
        if not self.buckets:
            raise CacheError(f"{folder / 'index.json'} names no clip", fix=fix)

    def check_fits(self, checkpoint: Path, config: Any) -> None:
        """Raise CacheError where this was prepared for another model than a checkpoint's.

        Args:
            checkpoint: The folder.
            config: Its transformer's.
        """
        task = "image-to-video" if config.in_channels == 2 * config.out_channels else "text-to-video"
        fix = (
            "run examples/finetune/prepare.py with a bundle that was exported from this checkpoint, into another folder"
        )
        if self.task != task:
            raise CacheError(f"the cache is for {self.task}, and the checkpoint makes videos {task}", fix=fix)
        place = checkpoint / "vae" / "config.json"
        with reading(place, CheckpointError, fix="name a checkpoint in diffusers layout"):
            scale = float(json.loads(place.read_bytes())["scaling_factor"])
        clip = next(iter(self.buckets.values()))[0]
        channels, width = self._load(clip["latents"])["mean"].shape[1], self._prompt(clip["prompt"]).shape[1]
        if (self._scale, channels, width) != (scale, config.out_channels, config.text_embed_dim):
            raise CacheError(f"{self._folder} is of another model than {checkpoint}", fix=fix)

    def batch(
        self, size: int, seed: int, step: int, process: int = 0, processes: int = 1, *, drop_captions: bool = True
    ) -> Batch:
        """Draw a process's part of a step: a bucket, as likely as it has clips, then of every example all that is its.

        An example's draws follow from its place in the step alone, so that two processes see what one with twice the
        batch sees.
        """
        draw = random.Random(repr((seed, step)))
        bucket = draw.choices(list(self.buckets.values()), [len(clips) for clips in self.buckets.values()])[0]
        total = size * processes
        # One timestep from each of `total` equal parts of the schedule: less noise in the loss than independent draws.
        parts = draw.sample(range(total), total)
        examples = [
            self._example(bucket, random.Random(repr((seed, step, place))), (parts[place], total), drop_captions)
            for place in range(process * size, (process + 1) * size)
        ]
        stacked: dict[str, Any] = {name: torch.stack([example[name] for example in examples]) for name in examples[0]}
        return Batch(**{"images": None, **stacked}, empty=self._prompt(self._empty)[None])

    def _example(
        self, bucket: list[dict[str, str]], draw: random.Random, part: tuple[int, int], drop: bool
    ) -> dict[str, Tensor]:
        """Draw one clip of a bucket, its noise, and a timestep from the first of that many parts of the schedule."""
        generator = torch.Generator().manual_seed(draw.getrandbits(48))
        clip = draw.choice(bucket)
        latents = self._drawn(clip["latents"], generator) * self._scale
        dropped = drop and draw.random() < _DROP_CAPTION
        drawn = {
            "latents": latents,
            "noise": torch.randn(latents.shape, generator=generator),
            "prompts": self._prompt(self._empty if dropped else clip["prompt"]),
            "timesteps": torch.tensor(int((part[0] + draw.random()) / part[1] * 1000)),
        }
        if self.task == "image-to-video":
            drawn["images"] = torch.zeros_like(latents)
            drawn["images"][:1] = self._drawn(clip["image"], generator) * self._image_scale
        return drawn

    def _drawn(self, name: str, generator: torch.Generator) -> Tensor:
        stored = self._load(name)
        mean = stored["mean"]
        return mean + stored["deviation"] * torch.randn(mean.shape, generator=generator)

    def _prompt(self, name: str) -> Tensor:
        return self._load(name)["prompt_embeds"]

    def _load(self, name: str) -> dict[str, Tensor]:
        path = self._folder / name
        with reading(path, CacheError, fix="remove it and run examples/finetune/prepare.py again"):
            return load_file(path)


def rotary(config: Any, frames: int, height: int, width: int) -> tuple[Tensor, Tensor] | None:
    """Return the rotary tables that diffusers' pipelines compute for latents of that size, if any."""
    if not config.use_rotary_positional_embeddings:
        return None
    patch, span = config.patch_size, config.patch_size_t
    grid, base = (height // patch, width // patch), (config.sample_height // patch, config.sample_width // patch)
    if span is None:
        crop = get_resize_crop_region_for_grid(grid, base[1], base[0])
        cos, sin = get_3d_rotary_pos_embed(config.attention_head_dim, crop, grid, frames)
    else:
        cos, sin = get_3d_rotary_pos_embed(
            config.attention_head_dim, None, grid, frames // span, grid_type="slice", max_size=base
        )
    return cos, sin


def predicted(transformer: torch.nn.Module, config: Any, noisy: Tensor, batch: Batch, prompts: Tensor) -> Tensor:
    """Predict v for noisy latents (B, F, C, H, W), as the pipelines do it."""
    tables = rotary(config, noisy.shape[1], *noisy.shape[3:])
    output: Tensor = transformer(
        hidden_states=noisy if batch.images is None else torch.cat([noisy, batch.images], dim=2),
        encoder_hidden_states=prompts,
        timestep=batch.timesteps,
        ofs=None if config.ofs_embed_dim is None else noisy.new_full((1,), _OFS),
        image_rotary_emb=None if tables is None else tuple(table.to(noisy.device) for table in tables),
        return_dict=False,
    )[0]
    return output


class Objective:
    """The loss of a batch.

    Args:
        scheduler: The checkpoint's noise schedule.
        config: The transformer's.
        min_snr: Where the weight of a timestep's signal-to-noise ratio is cut off (Hang et al. 2023, eq. 7 for v:
            ``min(snr, gamma) / (snr + 1)``); None weighs all alike.
        guidance: The scale of the teacher's guidance that the student is to do without; None learns from the clips.
    """

    def __init__(
        self, scheduler: CogVideoXDDIMScheduler, config: Any, min_snr: float | None, guidance: float | None
    ) -> None:
        self._scheduler, self._config, self._min_snr, self._guidance = scheduler, config, min_snr, guidance

    def loss(self, student: torch.nn.Module, teacher: CogVideoXTransformer3DModel, batch: Batch) -> Tensor:
        """Return the mean squared error of the student's v.

        Args:
            student: What is trained.
            teacher: The same network, whose adapters are switched off while it answers; unused without guidance.
            batch: On the student's device.
        """
        noisy = self._scheduler.add_noise(batch.latents, batch.noise, batch.timesteps)
        if self._guidance is None:
            target = self._scheduler.get_velocity(batch.latents, batch.noise, batch.timesteps)
        else:
            target = self._guided(teacher, noisy, batch, self._guidance)
        output = predicted(student, self._config, noisy, batch, batch.prompts)
        errors = (output.float() - target.float()).square().flatten(1).mean(1)
        return (errors * self._weights(batch.timesteps)).mean()

    def _guided(self, teacher: CogVideoXTransformer3DModel, noisy: Tensor, batch: Batch, scale: float) -> Tensor:
        teacher.disable_adapters()
        try:
            with torch.no_grad():
                said = predicted(teacher, self._config, noisy, batch, batch.prompts)
                unsaid = predicted(teacher, self._config, noisy, batch, batch.empty.expand_as(batch.prompts))
        finally:
            teacher.enable_adapters()
        return unsaid + scale * (said - unsaid)

    def _weights(self, timesteps: Tensor) -> Tensor:
        if self._min_snr is None:
            return torch.ones(len(timesteps), device=timesteps.device)
        kept = self._scheduler.alphas_cumprod.to(timesteps.device)[timesteps]
        # snr = kept / (1 - kept), so that snr + 1 = 1 / (1 - kept).
        return torch.minimum(kept, self._min_snr * (1 - kept)).float()
