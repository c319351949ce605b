"""The transformer's adaLN modulation: a timestep in, every shift, scale and gate of the transformer out.

Each block's norms take their shifts, scales and gates from a projection of the time embedding (adaLN-zero, Peebles and
Xie, arXiv:2212.09748). Nothing of it depends on the latents, and it holds 14% of the 5B's weights, 21% of the 2B's. So
it is a network of its own, run for every step before the first one; the transformer takes its rows as an input.
"""

from typing import Any

import torch
from diffusers import CogVideoXTransformer3DModel

from cvx_deploy.bundle.schema import DType, TensorSpec
from cvx_deploy.exporters.cogvideox.timesteps import TimestepTable, frequencies
from cvx_deploy.exporters.tracing.contract import NetworkContract
from cvx_deploy.precision import Precision

_BLOCK_ROWS, _LAST_ROWS = 6, 2


def row_counts(layers: int) -> list[int]:
    """Return how many rows each projection makes: two norms a block, of six rows, and the output norm's two."""
    return [_BLOCK_ROWS] * (2 * layers) + [_LAST_ROWS]


def modulation_spec(config: dict[str, Any], precision: Precision) -> TensorSpec:
    """Return what the modulation network puts out and the transformer takes, from ``transformer/config.json``.

    Its rows are, block by block, shift, scale and gate of the video tokens, then of the text tokens, of ``norm1`` and
    of ``norm2``; at the end shift and scale of ``norm_out``.
    """
    width = config["num_attention_heads"] * config["attention_head_dim"]
    dtype: DType = "float16" if precision == "fp16" else "float32"
    return TensorSpec("modulation", dtype, (1, sum(row_counts(config["num_layers"])), width), "BRD")


class Modulation(torch.nn.Module):
    """What of CogVideoX's transformer depends on the step alone."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        model = CogVideoXTransformer3DModel.from_config(config)
        kept = torch.nn.Module()
        inner = config["num_attention_heads"] * config["attention_head_dim"]
        flip = model.config.flip_sin_to_cos
        kept.time_proj, kept.time_embedding = TimestepTable(inner, flip), model.time_embedding
        self.ofs = model.ofs_proj is not None
        if self.ofs:
            kept.ofs_proj, kept.ofs_embedding = TimestepTable(model.config.ofs_embed_dim, flip), model.ofs_embedding
        kept.transformer_blocks = torch.nn.ModuleList()
        for block in model.transformer_blocks:
            kept.transformer_blocks.append(torch.nn.ModuleDict({"norm1": block.norm1, "norm2": block.norm2}))
        kept.norm_out = model.norm_out
        for norm in self._norms(kept):
            norm.norm = None
        self.model = kept

    @staticmethod
    def _norms(model: Any) -> list[Any]:
        """Return every norm with a projection, in the order of their rows."""
        return [*(norm for block in model.transformer_blocks for norm in block.values()), model.norm_out]

    def forward(self, timestep: torch.Tensor, ofs: torch.Tensor | None = None) -> torch.Tensor:
        """Return the rows ``(1, rows, D)`` for ``timestep (1,)``, as diffusers' ``forward`` computes them."""
        model: Any = self.model
        dtype = model.norm_out.linear.weight.dtype
        embedding = model.time_embedding(model.time_proj(timestep).to(dtype))
        if ofs is not None:
            embedding = embedding + model.ofs_embedding(model.ofs_proj(ofs).to(dtype))
        rows = torch.cat([norm.linear(norm.silu(embedding)) for norm in self._norms(model)], dim=-1)
        boundary = torch.float16 if dtype == torch.float16 else torch.float32
        return rows.to(boundary).reshape(1, -1, model.norm_out.linear.out_features // _LAST_ROWS)


class ModulationContract(NetworkContract):
    """Contract of the modulation network, which is the same at every shape."""

    name = "modulation"
    component = "transformer"

    def __init__(self, config: dict[str, Any], precision: Precision) -> None:
        super().__init__(config, precision)
        self.ofs = bool(config.get("ofs_embed_dim"))

    @property
    def input_specs(self) -> tuple[TensorSpec, ...]:
        """The timestep, and ofs where the model has it."""
        timestep = TensorSpec("timestep", "int64", (1,), "N")
        return (timestep, TensorSpec("ofs", "float32", (1,), "N")) if self.ofs else (timestep,)

    @property
    def output_specs(self) -> tuple[TensorSpec, ...]:
        """The rows."""
        return (modulation_spec(self.config, self.precision),)

    def build(self) -> torch.nn.Module:
        """Return the network."""
        return Modulation(self.config)

    def constants(self) -> dict[str, Any]:
        """Return the frequencies of the timestep's features, and of ofs's."""
        inner = self.config["num_attention_heads"] * self.config["attention_head_dim"]
        shift = self.config.get("freq_shift", 0)
        tables = {"model.time_proj.freqs": frequencies(inner, shift)}
        if self.ofs:
            tables["model.ofs_proj.freqs"] = frequencies(self.config["ofs_embed_dim"], shift)
        return tables

    def weight_names(self, parameter: str) -> tuple[str, ...]:
        """Return the diffusers name of a parameter."""
        return (parameter.removeprefix("model."),)


class ModulationRows(torch.nn.Module):
    """Hands the transformer's norms their rows of its ``modulation`` input, in place of the time embedding.

    diffusers passes what its time embedding returns on to every norm, which projects it: here that is one piece a norm,
    and a norm's projection takes its own.
    """

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.counts = row_counts(layers)

    def forward(self, modulation: torch.Tensor, condition: None) -> tuple[torch.Tensor, ...]:
        """Cut ``modulation (1, rows, D)`` into one piece a norm."""
        return torch.split(modulation, self.counts, dim=1)

    def serve(self, model: CogVideoXTransformer3DModel) -> None:
        """Take the place of the time embedding and of every projection; `model` may have fewer blocks than rows."""
        model.time_proj, model.time_embedding = torch.nn.Identity(), self
        model.ofs_proj = model.ofs_embedding = None
        layers, blocks = len(self.counts) // 2, model.transformer_blocks
        for index, block in enumerate(blocks):
            place = layers - 1 if index == len(blocks) - 1 else index
            for offset, norm in enumerate((block.norm1, block.norm2)):
                norm.silu, norm.linear = torch.nn.Identity(), _Piece(2 * place + offset)
        model.norm_out.silu, model.norm_out.linear = torch.nn.Identity(), _Piece(2 * layers)


class _Piece(torch.nn.Module):
    """One of the pieces that `ModulationRows` cuts, in the layout of a projection's output."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self.index = index

    def forward(self, pieces: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Return ``(1, rows * D)``."""
        return pieces[self.index].flatten(1)
