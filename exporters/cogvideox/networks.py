"""Which networks a CogVideoX checkpoint is traced into for a shape."""

from collections.abc import Iterable
from math import ceil

from cvx_deploy.exporters.cogvideox.modulation import ModulationContract
from cvx_deploy.exporters.cogvideox.riflex import check_riflex
from cvx_deploy.exporters.cogvideox.text_encoder import TextEncoderContract
from cvx_deploy.exporters.cogvideox.transformer import TransformerContract
from cvx_deploy.exporters.cogvideox.vae import VaeContract
from cvx_deploy.exporters.sources.checkpoint import Checkpoint, sensible_config
from cvx_deploy.exporters.tracing.contract import NetworkContract
from cvx_deploy.precision import Precision
from cvx_deploy.quantize.recipe import Recipe
from cvx_deploy.shape import Shape

ENCODER_CHUNK = 8
"""Video frames that diffusers encodes at a time, whatever the VAE's ratio (``num_sample_frames_batch_size``)."""
_DECODER_CHUNK = 2  # latent frames, likewise (num_latent_frames_batch_size)


def contracts_for(
    checkpoint: Checkpoint, shape: Shape, recipe: Recipe, *, riflex: bool = False
) -> list[NetworkContract]:
    """Return the contracts of every network that a shape needs."""
    transformer, vae = checkpoint.configs["transformer"], checkpoint.configs["vae"]
    temporal = checkpoint.limits.temporal
    spatial = 2 ** (len(vae["block_out_channels"]) - 1)
    contracts: list[NetworkContract] = []
    with sensible_config(checkpoint.place("text_encoder")):
        text_length = transformer["max_text_seq_length"]
        contracts.append(
            TextEncoderContract(checkpoint.configs["text_encoder"], recipe.text_encoder.compute, text_length)
        )
    with sensible_config(checkpoint.place("transformer")):
        contracts.append(ModulationContract(transformer, recipe.transformer.compute))
        contracts.append(
            TransformerContract(transformer, recipe.transformer.compute, shape, spatial, temporal, riflex=riflex)
        )
    with sensible_config(checkpoint.place("vae")):
        precision = recipe.vae.compute
        contracts += _encoder_contracts(checkpoint, shape, precision)
        frames = -(-shape.frames // temporal)
        contracts += _chunk_contracts(vae, precision, "vae_decoder_first", "vae_decoder_next", frames, _DECODER_CHUNK)
    return contracts


def _encoder_contracts(checkpoint: Checkpoint, shape: Shape, precision: Precision) -> list[NetworkContract]:
    """Return the encoder's chunks: one image for image-to-video, the whole clip for video-to-video.

    None where diffusers' video-to-video cannot do the shape: it does not pad, and its chunks must give the latent
    frames that it makes noise for.
    """
    vae, traits = checkpoint.configs["vae"], checkpoint.traits
    if traits.task == "image-to-video":
        return _chunk_contracts(vae, precision, "vae_encoder", "vae_encoder_next", 1, ENCODER_CHUNK)
    contracts = _chunk_contracts(vae, precision, "vae_encoder", "vae_encoder_next", shape.frames, ENCODER_CHUNK)
    temporal, following = checkpoint.limits.temporal, max(shape.frames // ENCODER_CHUNK - 1, 0)
    latent_frames = -(-shape.frames // temporal)
    first = shape.frames - following * ENCODER_CHUNK
    made = -(-first // temporal) + following * -(-ENCODER_CHUNK // temporal)
    fits = made == latent_frames and latent_frames % (traits.patch_size_t or 1) == 0
    return list(contracts) if fits else []


def _chunk_contracts(
    vae: dict[str, object], precision: Precision, first: str, following: str, frames: int, chunk: int
) -> list[NetworkContract]:
    """Return the first chunk, which takes the frames left over, and the steady one if any follows."""
    chunks = max(frames // chunk, 1)
    first_frames = frames - chunk * (chunks - 1)
    contracts: list[NetworkContract] = [VaeContract(vae, precision, first, first_frames, last=chunks == 1)]
    if chunks > 1:
        contracts.append(VaeContract(vae, precision, following, chunk, last=False))
    return contracts


def check_longer(checkpoint: Checkpoint, shapes: Iterable[Shape]) -> None:
    """Refuse RIFLEx where it would change nothing; see `riflex.check_riflex`."""
    config, temporal = checkpoint.configs["transformer"], checkpoint.limits.temporal
    patch = config.get("patch_size_t") or 1
    latents = {str(shape): ceil(shape.frames / temporal) for shape in shapes}
    check_riflex(config, {shape: ceil(count / patch) for shape, count in latents.items()})
