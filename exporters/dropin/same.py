"""Whether a pipeline's networks are those that a bundle was exported from."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cvx_deploy.bundle.opened import Bundle
from cvx_deploy.bundle.safetensors import StoredTensor, read_header
from cvx_deploy.errors import CvxError, WrongModelError
from cvx_deploy.exporters.sources.weights import TORCH_TYPES
from cvx_deploy.families.cogvideox.models import Traits

_LOOKED_AT = 1024
"""Values of every tensor that are compared: one page of a file for each, of the largest model in a second."""


def check_pipeline(pipe: Any, bundle: Bundle, names: list[str]) -> None:
    """Make sure that engines of a bundle give what the pipeline's own networks give.

    Args:
        pipe: A diffusers pipeline.
        bundle: What is to take the place of its networks.
        names: Of the networks.

    Raises:
        CvxError: A LoRA is loaded, or networks are moved by hooks.
        WrongModelError: Configs or weights are not those that the bundle was exported from.
    """
    for name in names:
        module = getattr(pipe, name)
        if getattr(module, "peft_config", None):
            raise CvxError(
                f"a LoRA is loaded in the pipeline's {name}, and the bundle's graphs know nothing of it",
                fix="call pipe.unload_lora_weights(), and export a bundle with --lora FILE",
            )
        if hasattr(module, "_hf_hook"):
            raise CvxError(
                f"hooks of accelerate move the pipeline's {name}",
                fix="call pipe.remove_all_hooks(), and leave out offloading",
            )
    checks = {"transformer": _check_transformer, "vae": _check_vae, "text_encoder": _check_text_encoder}
    for name in names:
        checks[name](getattr(pipe, name).config, bundle)
    for name in names:
        _check_weights(getattr(pipe, name), bundle, name)


def _check_transformer(config: Any, bundle: Bundle) -> None:
    manifest = bundle.manifest
    traits = Traits.from_transformer_config(dict(config), manifest.traits.task)
    specs = {spec.name: spec for spec in bundle.network("transformer").inputs}
    found = (config.in_channels, config.text_embed_dim)
    expected = (specs["hidden_states"].shape[2], specs["encoder_hidden_states"].shape[2])
    rows = bundle.network("modulation").outputs[0].shape
    width = config.num_attention_heads * config.attention_head_dim
    # Two norms of six rows a block, and the last norm's two.
    if traits != manifest.traits or found != expected or rows[1:] != (12 * config.num_layers + 2, width):
        raise _differs(bundle, "transformer", "config")


def _check_vae(config: Any, bundle: Bundle) -> None:
    vae = bundle.manifest.vae
    found = (
        *(config.latent_channels, config.temporal_compression_ratio, 2 ** (len(config.block_out_channels) - 1)),
        *(bool(config.invert_scale_latents), float(config.scaling_factor)),
    )
    if found != (vae.latent_channels, vae.temporal, vae.spatial, vae.invert_scale_latents, vae.scaling_factor):
        raise _differs(bundle, "vae", "config")


def _check_text_encoder(config: Any, bundle: Bundle) -> None:
    if config.d_model != bundle.network("text_encoder").outputs[0].shape[2]:
        raise _differs(bundle, "text_encoder", "config")


def _check_weights(module: torch.nn.Module, bundle: Bundle, name: str) -> None:
    """Compare the beginning of every tensor that the bundle takes from the checkpoint, in the module's own type."""
    own = module.state_dict()
    for plain, entry in bundle.manifest.weights.items():
        if not entry.path.startswith(f"{name}/"):
            continue  # another network's, or made by the export: merged and quantized tensors
        file = bundle.locate_weight(plain)
        for key, stored in read_header(file, entry.path).items():
            if key in own and own[key].device.type != "meta" and not _agrees(own[key], file, stored):
                raise _differs(bundle, name, f"tensor {key}")


def _agrees(own: torch.Tensor, file: Path, stored: StoredTensor) -> bool:
    """Whether a module's tensor is the stored one, through half precision too."""
    if tuple(own.shape) != stored.shape:
        return False
    if 0 in stored.shape:
        return True
    kept = TORCH_TYPES[stored.dtype]
    count = min(own.numel(), _LOOKED_AT)
    raw: NDArray[np.uint8] = np.fromfile(file, np.uint8, count * kept.itemsize, offset=stored.offset)
    expected = torch.from_numpy(raw).view(kept)
    found = own.detach().flatten()[:count].cpu()
    ways = (kept, torch.bfloat16, torch.float16)
    return any(torch.equal(expected.to(way).to(found.dtype), found) for way in ways)


def _differs(bundle: Bundle, name: str, what: str) -> WrongModelError:
    checkpoint = bundle.manifest.provenance.get("source", bundle.manifest.checkpoint)
    return WrongModelError(
        f"the pipeline's {name} is not the one that {bundle.path} was exported from: its {what} differs",
        fix=f"load the pipeline from {checkpoint}, or export a bundle of this one: cvx-deploy export --help",
    )
