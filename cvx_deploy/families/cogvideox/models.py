"""What the CogVideoX models are: the published five, the traits that tell them apart, and the shapes they can do.

A checkpoint's own ``config.json`` always wins; `MODELS` says which traits a name stands for, and its defaults.
"""

from dataclasses import dataclass
from typing import Any, Literal

from cvx_deploy.bounds import LONGEST_SIDE, MOST_FRAMES, MOST_PIXELS, check_video
from cvx_deploy.errors import ShapeError
from cvx_deploy.shape import Shape

Task = Literal["text-to-video", "image-to-video"]
Positions = Literal["sincos", "rope", "rope+learned"]
SchedulerKind = Literal["ddim", "dpm"]


@dataclass(frozen=True)
class Traits:
    """What makes one CogVideoX architecture different from another, whatever its width and depth.

    Attributes:
        task: Image-to-video transformers take image latents as a second half of their input channels.
        positions: How tokens learn where they are.
        patch_size_t: Latent frames a token spans; None before version 1.5.
        ofs: Whether the transformer takes an ``ofs`` embedding (1.5 image-to-video).
    """

    task: Task
    positions: Positions
    patch_size_t: int | None
    ofs: bool

    @classmethod
    def from_transformer_config(cls, config: dict[str, Any], task: Task) -> "Traits":
        """Read the traits from a diffusers ``transformer/config.json``; the task stands in ``model_index.json``."""
        return cls(task, positions_of(config), config.get("patch_size_t"), bool(config.get("ofs_embed_dim")))


def positions_of(config: dict[str, Any]) -> Positions:
    """Return which positions a transformer of that ``config.json`` has."""
    rotary = bool(config.get("use_rotary_positional_embeddings", False))
    learned = bool(config.get("use_learned_positional_embeddings", False))
    return ("rope+learned" if learned else "rope") if rotary else "sincos"


@dataclass(frozen=True)
class Model:
    """One published model: its traits, its size, and the defaults its authors give.

    Attributes:
        name: What people type after ``--model``.
        hub_id: Its repository on the Hugging Face hub.
        num_layers: Transformer blocks.
        num_attention_heads: Heads, each `attention_head_dim` wide.
        frames: Default video frames; `height` and `width` in pixels, `fps` in frames a second.
        dtype: The type its weights are published in.
        scheduler: The sampler its authors recommend.
        snr_shift_scale: The scheduler's signal-to-noise shift.
        scaling_factor: The VAE's latent scale.
        invert_scale_latents: 1.5 was trained on image latents divided by the scale.
        sample_height: The transformer config's ``sample_height``, in latents; `sample_width` likewise.
    """

    name: str
    hub_id: str
    traits: Traits
    num_layers: int
    num_attention_heads: int
    frames: int
    height: int
    width: int
    fps: int
    dtype: Literal["float16", "bfloat16"]
    scheduler: SchedulerKind
    snr_shift_scale: float
    scaling_factor: float
    invert_scale_latents: bool
    sample_height: int
    sample_width: int
    attention_head_dim: int = 64
    family: Literal["cogvideox"] = "cogvideox"


_T2V: Task = "text-to-video"
_I2V: Task = "image-to-video"

MODELS: dict[str, Model] = {
    model.name: model
    for model in (
        Model(
            "2b", "zai-org/CogVideoX-2b", Traits(_T2V, "sincos", None, False), 30, 30, 49, 480, 720, 8,
            "float16", "ddim", 3.0, 1.15258426, False, 60, 90,
        ),
        Model(
            "5b", "zai-org/CogVideoX-5b", Traits(_T2V, "rope", None, False), 42, 48, 49, 480, 720, 8,
            "bfloat16", "dpm", 1.0, 0.7, False, 60, 90,
        ),
        Model(
            "5b-i2v", "zai-org/CogVideoX-5b-I2V", Traits(_I2V, "rope+learned", None, False), 42, 48, 49, 480, 720, 8,
            "bfloat16", "dpm", 1.0, 0.7, False, 60, 90,
        ),
        Model(
            "1.5-5b", "zai-org/CogVideoX1.5-5B", Traits(_T2V, "rope", 2, False), 42, 48, 81, 768, 1360, 16,
            "bfloat16", "dpm", 1.0, 0.7, True, 96, 170,
        ),
        Model(
            "1.5-5b-i2v", "zai-org/CogVideoX1.5-5B-I2V", Traits(_I2V, "rope", 2, True), 42, 48, 81, 768, 1360, 16,
            "bfloat16", "dpm", 1.0, 0.7, True, 300, 300,
        ),
    )
}  # fmt: skip


def model_with_traits(traits: Traits) -> Model | None:
    """Name the published model that has these traits, or None when none has."""
    return next((model for model in MODELS.values() if model.traits == traits), None)


@dataclass(frozen=True)
class Limits:
    """What shapes a checkpoint can do, read from its configs.

    Attributes:
        spatial: Pixels a token spans in height and in width (VAE compression times patch size).
        temporal: Video frames a latent frame spans.
        sample_height: Trained height in pixels; `sample_width` likewise.
        fixed_size: Learned positions exist for the trained size only.
        table_size: Version 1.5 slices its rotary table out of one of the trained size, so larger does not exist.
    """

    spatial: int
    temporal: int
    sample_height: int
    sample_width: int
    fixed_size: bool
    table_size: bool

    @property
    def frame_period(self) -> int:
        """The VAE decodes two latent frames at a time: counts go up in steps of this, plus at most one."""
        return 2 * self.temporal

    def nearest_frames(self, frames: int) -> tuple[int, ...]:
        """Return the nearest frame counts at or around `frames` that can be decoded, ascending."""
        period = self.frame_period
        base = max(frames, 1) // period * period
        candidates = {n for k in (base - period, base, base + period) for n in (k, k + 1) if n > 0}
        below = [n for n in sorted(candidates) if n <= frames]
        above = [n for n in sorted(candidates) if n > frames]
        return tuple(below[-1:] + above[:1])

    def check(self, shape: "Shape") -> None:
        """Raise ShapeError, naming the nearest shape that works, unless this checkpoint can do `shape`."""
        if shape.frames < 1 or shape.frames % self.frame_period not in (0, 1):
            nearest = " or ".join(str(n) for n in self.nearest_frames(shape.frames))
            raise ShapeError(
                f"{shape.frames} frames: the VAE decodes {self.frame_period}k or {self.frame_period}k + 1 frames",
                fix=f"use --frames {nearest}",
            )
        self._check_size("height", shape.height, self.sample_height)
        self._check_size("width", shape.width, self.sample_width)
        try:
            check_video(shape.frames, shape.height, shape.width)
        except ValueError as error:
            raise ShapeError(str(error), fix=f"use {self._within_bounds(shape)}") from error

    def _within_bounds(self, shape: "Shape") -> str:
        """Return the option that makes a shape beyond the bounds smaller."""
        for axis, size in (("height", shape.height), ("width", shape.width)):
            if size > LONGEST_SIDE:
                return f"--{axis} {LONGEST_SIDE // self.spatial * self.spatial}"
        fitting = min(MOST_FRAMES, MOST_PIXELS // max(shape.height * shape.width, 1)) // self.frame_period
        if fitting:
            return f"--frames {fitting * self.frame_period}"
        return f"--height {LONGEST_SIDE // 4 // self.spatial * self.spatial}"

    def _check_size(self, axis: str, size: int, trained: int) -> None:
        if self.fixed_size and size != trained:
            raise ShapeError(
                f"{axis} {size}: the learned positions of this model exist for "
                f"{self.sample_height}x{self.sample_width} only",
                fix=f"use --{axis} {trained}",
            )
        largest = trained if self.table_size else max(size, 1) + self.spatial
        possible = range(self.spatial, largest + 1, self.spatial)
        if size in possible:
            return
        if self.table_size and size > trained:
            raise ShapeError(
                f"{axis} {size}: the rotary table of this model ends at {trained}", fix=f"use --{axis} {possible[-1]}"
            )
        floor = size // self.spatial * self.spatial
        nearest = [near for near in (floor, floor + self.spatial) if near in possible] or possible[:1]
        raise ShapeError(
            f"{axis} {size} is not a multiple of {self.spatial}", fix=f"use --{axis} {' or '.join(map(str, nearest))}"
        )
