"""Whether the components of a checkpoint fit each other, by their configs alone, before anything is fetched or traced.

Each check is one that diffusers' pipelines, or the networks they are made of, take for granted or raise on.
"""

from collections.abc import Iterator
from typing import Any

import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel

from cvx_deploy.errors import CheckpointError
from cvx_deploy.exporters.sources.checkpoint import Checkpoint, sensible_config
from cvx_deploy.families.cogvideox.models import positions_of

_SPLIT = 16  # a quarter for time and three eighths for height and width, each of pairs: get_3d_rotary_pos_embed


def check_fit(checkpoint: Checkpoint) -> None:
    """Raise unless the text encoder, the transformer and the VAE make one pipeline together.

    Raises:
        CheckpointError: Which two numbers must agree and do not, or what diffusers refuses.
    """
    transformer, vae = checkpoint.configs["transformer"], checkpoint.configs["vae"]
    for unfit in (*_unequal(checkpoint), *_refused(checkpoint.traits.task, transformer), *_uneven_vae(vae)):
        raise CheckpointError(f"{checkpoint.root}: {unfit}", fix="take all components from one CogVideoX checkpoint")
    for component, kind in (("transformer", CogVideoXTransformer3DModel), ("vae", AutoencoderKLCogVideoX)):
        config = checkpoint.configs[component]
        few = {key: value for key, value in config.items() if not key.startswith("_")} | {"num_layers": 1}
        with sensible_config(checkpoint.place(component)), torch.device("meta"):
            kind.from_config(few)


def _unequal(checkpoint: Checkpoint) -> Iterator[str]:
    """Yield the pairs of numbers that differ."""
    transformer, vae = checkpoint.configs["transformer"], checkpoint.configs["vae"]
    latents = vae["latent_channels"]
    times, told = (2, "twice ") if checkpoint.traits.task == "image-to-video" else (1, "")
    width = checkpoint.configs["text_encoder"]["d_model"]
    for what, found, must, wanted in (
        ("text_embed_dim of the transformer", transformer["text_embed_dim"], "d_model of the text encoder", width),
        (
            f"in_channels of the transformer ({checkpoint.traits.task})",
            transformer["in_channels"],
            f"{told}latent_channels of the VAE",
            times * latents,
        ),
        ("out_channels of the transformer", transformer["out_channels"], "latent_channels of the VAE", latents),
        ("in_channels of the VAE", vae["in_channels"], "the channels of a picture", 3),
        ("out_channels of the VAE", vae["out_channels"], "the channels of a picture", 3),
    ):
        if found != wanted:
            yield f"{what} is {found}, and must be {must}, which is {wanted}"


def _refused(task: str, config: dict[str, Any]) -> Iterator[str]:
    """Yield what of a transformer diffusers cannot run."""
    heads, width = config["num_attention_heads"], config["attention_head_dim"]
    positions = positions_of(config)
    if positions == "sincos" and config["use_learned_positional_embeddings"]:
        yield "use_learned_positional_embeddings of the transformer needs use_rotary_positional_embeddings"
    if positions != "sincos" and width % _SPLIT:
        yield f"attention_head_dim of the transformer is {width}; rotary positions split multiples of {_SPLIT} only"
    if positions != "rope" and heads * width % _SPLIT:
        yield (
            f"num_attention_heads times attention_head_dim of the transformer is {heads * width}; sin-cos positions "
            f"split multiples of {_SPLIT} only"
        )
    if positions != "rope" and (config["patch_size_t"] or 1) > 1:
        yield (
            f"patch_size_t of the transformer is {config['patch_size_t']}, which goes with rotary positions only: "
            "sin-cos and learned ones count every latent frame"
        )
    if config["ofs_embed_dim"] and task != "image-to-video":
        yield (
            f"ofs_embed_dim of the transformer is {config['ofs_embed_dim']}, which diffusers feeds to image-to-video "
            "models only, and model_index.json names a text-to-video pipeline"
        )


def _uneven_vae(config: dict[str, Any]) -> Iterator[str]:
    """Yield how the blocks of a VAE miss the ratio that its config gives; the last block never halves the frames."""
    ratio, blocks = config["temporal_compression_ratio"], len(config["block_out_channels"])
    reached = 2 ** min(max(int(ratio).bit_length() - 1, 0), blocks - 1)
    if reached != ratio:
        yield (
            f"temporal_compression_ratio of the VAE is {ratio:g}, and its {blocks} block_out_channels give {reached}"
        )
    for key in ("down_block_types", "up_block_types"):
        if not isinstance(config[key], list | tuple) or len(config[key]) != blocks:
            yield f"{key} of the VAE must be as many as its block_out_channels, which are {blocks}"
