"""The configs of a checkpoint, read as diffusers and transformers read them.

Which class a component is of stands in ``model_index.json``; what its own config calls itself is not asked
(``DiffusionPipeline.from_pretrained``). A key that a config leaves out, or lists in ``_use_default_values``, has the
class's own default (``ConfigMixin.extract_init_dict``).
"""

import inspect
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    CogVideoXTransformer3DModel,
)
from transformers import T5Config

from cvx_deploy.bounds import Positive
from cvx_deploy.errors import CheckpointError, WrongModelError

CLASSES: Final[dict[str, dict[str, Any]]] = {
    "transformer": {"CogVideoXTransformer3DModel": CogVideoXTransformer3DModel},
    "vae": {"AutoencoderKLCogVideoX": AutoencoderKLCogVideoX},
    "scheduler": {
        "CogVideoXDDIMScheduler": CogVideoXDDIMScheduler,
        "CogVideoXDPMScheduler": CogVideoXDPMScheduler,
    },
    "text_encoder": {"T5EncoderModel": T5Config},
    "tokenizer": {"T5Tokenizer": None, "T5TokenizerFast": None},
}
"""Component to the classes that it may be of, and what has their defaults."""


class _Transformer(msgspec.Struct):
    """What must make sense in ``transformer/config.json``; the rest is diffusers' own business."""

    in_channels: Positive
    out_channels: Positive
    patch_size: Positive
    num_attention_heads: Positive
    attention_head_dim: Positive
    num_layers: Positive
    text_embed_dim: Positive
    max_text_seq_length: Positive
    sample_frames: Positive
    sample_height: Positive
    sample_width: Positive
    temporal_compression_ratio: Positive
    patch_size_t: Positive | None
    ofs_embed_dim: Positive | None


class _Vae(msgspec.Struct):
    """Likewise of ``vae/config.json``."""

    block_out_channels: Annotated[list[Positive], msgspec.Meta(min_length=1)]
    in_channels: Positive
    out_channels: Positive
    latent_channels: Positive
    sample_height: Positive
    sample_width: Positive
    temporal_compression_ratio: Annotated[float, msgspec.Meta(gt=0)]
    scaling_factor: Annotated[float, msgspec.Meta(gt=0)]


class _TextEncoder(msgspec.Struct):
    """Likewise of ``text_encoder/config.json``."""

    d_model: Positive
    num_layers: Positive
    vocab_size: Positive


_NEEDED: Final[dict[str, type[msgspec.Struct]]] = {
    "transformer": _Transformer,
    "vae": _Vae,
    "text_encoder": _TextEncoder,
}


def class_in_index(index: dict[str, Any], component: str, path: Path) -> str:
    """Return the class that ``model_index.json``, which lies at `path`, gives a component.

    Raises:
        CheckpointError: It names none.
        WrongModelError: It names one that no CogVideoX has.
    """
    entry, known = index.get(component), list(CLASSES[component])
    if not isinstance(entry, list) or len(entry) != 2 or not isinstance(entry[1], str):
        raise CheckpointError(
            f"{path} names no class of the {component}",
            fix=f"add the line of a CogVideoX checkpoint, such as that of {known[-1]}, or fetch the file again",
        )
    if entry[1] not in known:
        raise WrongModelError(
            f"{path} says that the {component} is a {entry[1]}, not a {' or '.join(known)}",
            fix="use a CogVideoX checkpoint",
        )
    return entry[1]


def filled_config(component: str, class_name: str, config: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return a component's config with the defaults of its class for all that it leaves out.

    Args:
        component: Its folder's name.
        class_name: One of `CLASSES`.
        config: What its file holds, which lies at `path`.

    Raises:
        CheckpointError: A value is of the wrong type or out of range; the message names its key.
    """
    unset = config.get("_use_default_values")
    given = {key: value for key, value in config.items() if not isinstance(unset, list) or key not in unset}
    if component == "text_encoder":
        filled = {key: getattr(T5Config(), key) for key in _TextEncoder.__struct_fields__} | given
    else:
        filled = _defaults(CLASSES[component][class_name]) | given | {"_class_name": class_name}
    if component in _NEEDED:
        try:
            msgspec.convert(filled, _NEEDED[component])
        except msgspec.ValidationError as error:
            raise CheckpointError(f"{path} is damaged: {error}", fix="fetch the file again") from error
    return filled


def other_class(component: str, class_name: str, config: dict[str, Any], path: Path, index: Path) -> str | None:
    """Return a note where a config calls itself something else than ``model_index.json`` does, which is believed."""
    key, wanted = ("model_type", "t5") if component == "text_encoder" else ("_class_name", class_name)
    if config.get(key, wanted) == wanted:
        return None
    return (
        f"note: {path} calls itself {config[key]!r:.80}; it is read as {class_name}, as {index} says and diffusers does"
    )


def _defaults(of: Any) -> dict[str, Any]:
    parameters = inspect.signature(of.__init__).parameters
    return {name: each.default for name, each in parameters.items() if each.default is not inspect.Parameter.empty}
