"""The diffusion transformer: noisy latents, prompt embeddings and a step's modulation in, the v-prediction out."""

from typing import Any

import numpy as np
import torch
from diffusers import CogVideoXTransformer3DModel
from diffusers.models.embeddings import get_3d_rotary_pos_embed, get_3d_sincos_pos_embed
from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid
from numpy.typing import NDArray

from cvx_deploy.bundle.schema import TensorSpec
from cvx_deploy.exporters.cogvideox.modulation import ModulationRows, modulation_spec
from cvx_deploy.exporters.cogvideox.riflex import lowered, riflex_for
from cvx_deploy.exporters.tracing.contract import NetworkContract, as_numpy
from cvx_deploy.exporters.tracing.repeat import Blocks
from cvx_deploy.families.cogvideox.models import positions_of
from cvx_deploy.precision import Precision
from cvx_deploy.shape import Shape

_POSITIONS = "model.embedding_dropout.positions"


class AddPositions(torch.nn.Module):
    """Adds absolute positions to the joint sequence, right after patch embedding (in place of its dropout)."""

    def __init__(self, positions: torch.nn.Module) -> None:
        super().__init__()
        self.positions = positions

    def forward(self, embeds: torch.Tensor) -> torch.Tensor:
        """Return ``embeds (B, text + video tokens, D)`` plus positions of the same length."""
        joint: torch.Tensor = self.positions()
        return embeds + joint.to(embeds.dtype)


class LearnedPositions(torch.nn.Module):
    """The checkpoint's own table (5B-I2V)."""

    def __init__(self, table: torch.Tensor) -> None:
        super().__init__()
        self.table = torch.nn.Parameter(table, requires_grad=False)

    def forward(self) -> torch.Tensor:
        """Return the table ``(1, text + video tokens, D)``."""
        return self.table


class Grid(torch.nn.Module):
    """A table over video tokens, kept as its three axes: time, height and width, each ``(size, channels)``.

    Sin-cos and rotary tables are concatenations of one part per axis, so a 49x480x720 table of 136 MB is kept in 200
    KB. `order` says how the parts stand in the channels.
    """

    def __init__(self, sizes: tuple[int, int, int], channels: tuple[int, int, int], order: str) -> None:
        super().__init__()
        self.sizes = sizes
        self.order = order
        for axis, size, width in zip("thw", sizes, channels, strict=True):
            self.register_buffer(axis, torch.zeros(size, width, dtype=torch.float32), persistent=False)

    def forward(self) -> torch.Tensor:
        """Return the whole table ``(tokens, channels)``."""
        t, h, w = self.sizes
        views = {"t": (t, 1, 1, -1), "h": (1, h, 1, -1), "w": (1, 1, w, -1)}
        parts = [getattr(self, axis).view(views[axis]).expand(t, h, w, -1) for axis in self.order]
        return torch.cat(parts, dim=-1).reshape(t * h * w, -1)


class SinCosPositions(torch.nn.Module):
    """Fixed 3D sin-cos positions over the video tokens, zero over the text tokens (2B)."""

    def __init__(self, grid: Grid, text_length: int) -> None:
        super().__init__()
        self.grid = grid
        self.text_length = text_length

    def forward(self) -> torch.Tensor:
        """Return the joint table ``(1, text + video tokens, D)``."""
        return torch.nn.functional.pad(self.grid(), (0, 0, self.text_length, 0)).unsqueeze(0)


class Transformer(torch.nn.Module):
    """CogVideoX's transformer: what depends on the shape alone is a constant, on the step alone an input.

    Args:
        config: ``transformer/config.json``, with as many layers as are to be traced.
        layers: How many the network has.
        tokens: Video tokens along time, height and width.
        positions: Which positions it knows: learned, sincos or rotary.
    """

    def __init__(self, config: dict[str, Any], layers: int, tokens: tuple[int, int, int], positions: str) -> None:
        super().__init__()
        model = CogVideoXTransformer3DModel.from_config(config)
        inner = model.config.num_attention_heads * model.config.attention_head_dim
        if positions == "learned":
            model.embedding_dropout = AddPositions(LearnedPositions(model.patch_embed.pos_embedding))
        elif positions == "sincos":
            grid = Grid(tokens, (inner // 4, inner // 8 * 3, inner // 8 * 3), "twh")
            model.embedding_dropout = AddPositions(SinCosPositions(grid, model.config.max_text_seq_length))
        model.patch_embed.use_positional_embeddings = False
        model.patch_embed.use_learned_positional_embeddings = False
        model.patch_embed.pos_embedding = None
        ModulationRows(layers).serve(model)
        self.model = model
        self.cos = self.sin = None
        if model.config.use_rotary_positional_embeddings:
            width = model.config.attention_head_dim
            widths = (width // 4, width // 8 * 3, width // 8 * 3)
            self.cos, self.sin = Grid(tokens, widths, "thw"), Grid(tokens, widths, "thw")

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        modulation: torch.Tensor,
    ) -> torch.Tensor:
        """Predict v for ``hidden_states (B, F, C, H, W)``; one step's modulation serves the whole batch."""
        dtype = self.model.proj_out.weight.dtype
        rotary = None if self.cos is None or self.sin is None else (self.cos(), self.sin())
        output: torch.Tensor = self.model(
            hidden_states.to(dtype),
            encoder_hidden_states.to(dtype),
            modulation,
            image_rotary_emb=rotary,
            return_dict=False,
        )[0]
        return output.float()


class TransformerContract(NetworkContract):
    """Contract of the transformer at one shape; with `riflex` for videos longer than it was trained on."""

    name = "transformer"
    component = "transformer"

    def __init__(
        self,
        config: dict[str, Any],
        precision: Precision,
        shape: Shape,
        spatial: int,
        temporal: int,
        *,
        riflex: bool = False,
    ) -> None:
        super().__init__(config, precision)
        frames = -(-shape.frames // temporal)
        period = config.get("patch_size_t") or 1
        # 1.5 pads the latent frames until its temporal patches divide them.
        self.latent_shape = (-(-frames // period) * period, shape.height // spatial, shape.width // spatial)
        patch = config["patch_size"]
        self.tokens = (self.latent_shape[0] // period, self.latent_shape[1] // patch, self.latent_shape[2] // patch)
        self.riflex = riflex_for(config, self.tokens[0]) if riflex else None
        self.positions = "rotary"
        self.knows = positions_of(config)
        if self.knows != "rope":
            self.positions = "learned" if self.knows == "rope+learned" and self._is_trained_size() else "sincos"

    def _is_trained_size(self) -> bool:
        """Whether learned positions are used: elsewhere, as in diffusers, sin-cos takes over.

        diffusers turns latent frames back into video frames of the form ``ratio * k + 1`` and compares those with
        ``sample_frames`` (``CogVideoXPatchEmbed.forward``), so that another ``sample_frames`` is never met.
        """
        config, (frames, *plane) = self.config, self.latent_shape
        of_video = (frames - 1) * config["temporal_compression_ratio"] + 1
        return (of_video, *plane) == tuple(config[f"sample_{name}"] for name in ("frames", "height", "width"))

    @property
    def input_specs(self) -> tuple[TensorSpec, ...]:
        """Latents (image-to-video: with the image latents as further channels), prompt embeddings, modulation."""
        config = self.config
        text = ("batch", config["max_text_seq_length"], config["text_embed_dim"])
        frames, height, width = self.latent_shape
        return (
            TensorSpec("hidden_states", "float32", ("batch", frames, config["in_channels"], height, width), "BFCHW"),
            TensorSpec("encoder_hidden_states", "float32", text, "BSD"),
            modulation_spec(config, self.precision),
        )

    @property
    def output_specs(self) -> tuple[TensorSpec, ...]:
        """The prediction, of the latents' shape."""
        frames, height, width = self.latent_shape
        channels = self.config.get("out_channels") or self.config["in_channels"]
        return (TensorSpec("noise_pred", "float32", ("batch", frames, channels, height, width), "BFCHW"),)

    @property
    def blocks(self) -> Blocks:
        """The expert transformer blocks."""
        return Blocks("model.transformer_blocks", int(self.config["num_layers"]))

    def build(self) -> torch.nn.Module:
        """Return the transformer."""
        return Transformer(
            {**self.config, "num_layers": self.blocks.traced}, self.blocks.count, self.tokens, self.positions
        )

    def constants(self) -> dict[str, NDArray[Any]]:
        """Return the sin-cos and rotary tables, computed by diffusers' own functions."""
        config = self.config
        inner = config["num_attention_heads"] * config["attention_head_dim"]
        tables: dict[str, NDArray[Any]] = {}
        if self.positions == "sincos":
            tables |= _axes(f"{_POSITIONS}.grid", self._sincos(inner), inner, "twh")
        if self.knows != "sincos":
            cos, sin = self._rotary()
            tables |= _axes("cos", cos, config["attention_head_dim"], "thw")
            tables |= _axes("sin", sin, config["attention_head_dim"], "thw")
            if self.riflex is not None:
                tables["cos.t"] = lowered(tables["cos.t"], self.riflex, np.cos)
                tables["sin.t"] = lowered(tables["sin.t"], self.riflex, np.sin)
        return tables

    def weight_names(self, parameter: str) -> tuple[str, ...]:
        """Return the diffusers name of a parameter."""
        if parameter == f"{_POSITIONS}.table":
            return ("patch_embed.pos_embedding",)
        return (parameter.removeprefix("model."),)

    def _sincos(self, channels: int) -> torch.Tensor:
        t, h, w = self.tokens
        table: torch.Tensor = get_3d_sincos_pos_embed(
            channels,
            (w, h),
            t,
            self.config.get("spatial_interpolation_scale", 1.875),
            self.config.get("temporal_interpolation_scale", 1.0),
        )
        return table.reshape(t, h, w, channels)

    def _rotary(self) -> tuple[torch.Tensor, torch.Tensor]:
        t, h, w = self.tokens
        width = self.config["attention_head_dim"]
        patch = self.config["patch_size"]
        base = (self.config["sample_height"] // patch, self.config["sample_width"] // patch)
        if self.config.get("patch_size_t") is None:
            crops = get_resize_crop_region_for_grid((h, w), base[1], base[0])
            cos, sin = get_3d_rotary_pos_embed(width, crops, (h, w), t)
        else:
            cos, sin = get_3d_rotary_pos_embed(width, None, (h, w), t, grid_type="slice", max_size=base)
        return cos.reshape(t, h, w, width), sin.reshape(t, h, w, width)


def _axes(prefix: str, table: torch.Tensor, channels: int, order: str) -> dict[str, NDArray[Any]]:
    """Cut a table ``(T, H, W, channels)`` into the three axes of a `Grid`."""
    widths = {"t": channels // 4, "h": channels // 8 * 3, "w": channels // 8 * 3}
    lines = {"t": table[:, 0, 0], "h": table[0, :, 0], "w": table[0, 0, :]}
    axes, start = {}, 0
    for axis in order:
        axes[f"{prefix}.{axis}"] = as_numpy(lines[axis][:, start : start + widths[axis]].float())
        start += widths[axis]
    return axes
