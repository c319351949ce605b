"""The architecture that a checkpoint's configs describe, to hold formulas for the published ones against any."""

import json
from pathlib import Path
from typing import Any

from cvx_deploy.families.cogvideox.architecture import Architecture, TextEncoder, Transformer, Vae


def architecture_of(checkpoint: Path) -> Architecture:
    """Read the ``config.json`` of each of a checkpoint's networks."""
    configs: tuple[Any, ...] = tuple(
        json.loads((checkpoint / part / "config.json").read_text()) for part in ("transformer", "text_encoder", "vae")
    )
    transformer, text_encoder, vae = configs
    learned = transformer.get("use_learned_positional_embeddings")
    frames = 1 + (transformer["sample_frames"] - 1) // 4
    tokens = frames * (transformer["sample_height"] // 2) * (transformer["sample_width"] // 2)
    text_length = transformer["max_text_seq_length"]
    return Architecture(
        Transformer(
            layers=transformer["num_layers"],
            heads=transformer["num_attention_heads"],
            head_dim=transformer["attention_head_dim"],
            in_channels=transformer["in_channels"],
            out_channels=transformer["out_channels"],
            patch_frames=transformer.get("patch_size_t"),
            text_dim=transformer["text_embed_dim"],
            time_dim=transformer["time_embed_dim"],
            text_length=text_length,
            learned_positions=text_length + tokens if learned else 0,
            ofs=bool(transformer.get("ofs_embed_dim")),
        ),
        TextEncoder(
            layers=text_encoder["num_layers"],
            width=text_encoder["d_model"],
            heads=text_encoder["num_heads"],
            head_dim=text_encoder["d_kv"],
            hidden=text_encoder["d_ff"],
            vocabulary=text_encoder["vocab_size"],
            buckets=text_encoder["relative_attention_num_buckets"],
        ),
        Vae(
            channels=tuple(vae["block_out_channels"]),
            layers=vae["layers_per_block"],
            latent_channels=vae["latent_channels"],
            temporal=vae["temporal_compression_ratio"],
        ),
    )
