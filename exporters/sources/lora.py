"""Low-rank adapters, merged into the transformer's weights as diffusers' ``fuse_lora`` merges them.

diffusers loads the transformer in the pipeline's type, casts every adapter to it, and adds
``B @ A * (scale * alpha / rank)`` to each weight, one adapter after the other. The product of half precision matrices
is computed in float32 and rounded before it is added (peft's ``get_delta_weight`` on a CPU). The same is done here, one
tensor at a time, from the checkpoint's file into one new file; whatever no adapter touches stays where it is.

Key forms, for a layer ``transformer_blocks.0.attn1.to_q``:

- diffusers, and CogVideo's exporter of SAT adapters: ``transformer.<layer>.lora_A.weight``
- older diffusers: ``transformer.<layer>.lora.down.weight``, ``....processor.to_q_lora.down.weight``
- PEFT: ``base_model.model.<layer>.lora_A.weight``, ``.lora_A.default.weight``
- ComfyUI and others: ``diffusion_model.<layer>.lora_down.weight``
- kohya, OneTrainer, VideoX-Fun: ``lora_unet_transformer_blocks_0_attn1_to_q.lora_down.weight``, whose dots are found
  again in the names of the checkpoint's own layers

Alpha stands in the file's header (``lora_adapter_metadata``), in an ``adapter_config.json`` beside it, or in a tensor
``<layer>.alpha``; where it stands nowhere, alpha is the rank, as in diffusers.
"""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

import regex
import torch
from safetensors import safe_open

from cvx_deploy.bounds import finite_json
from cvx_deploy.bundle.safetensors import StoredTensor
from cvx_deploy.bundle.schema import Lora, WeightFile
from cvx_deploy.errors import CheckpointError, WrongModelError
from cvx_deploy.exporters.sources.checkpoint import PICKLES, Checkpoint, DerivedTensors
from cvx_deploy.exporters.sources.weights import PlannedTensor, load_tensor, stored_tensors, write_safetensors
from cvx_deploy.exporters.tracing.contract import TORCH_DTYPES
from cvx_deploy.families.registry import MODELS
from cvx_deploy.files import sha256_of
from cvx_deploy.precision import Precision
from cvx_deploy.progress import Progress
from cvx_deploy.reading import check_regular, read_whole, reading

MERGED: Final = "transformer.lora.safetensors"
"""The file in the bundle that holds the merged weights."""

_FILES: Final = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
_NEW: Final = re.compile(r"(?P<layer>.+)\.lora_(?P<side>[AB])(?:\.\w+)??\.(?P<kind>weight|bias)")
_DOWN_UP: Final = re.compile(r"(?P<layer>.+)\.lora[._](?P<side>down|up)\.weight")
_FLAT: Final = re.compile(r"lora_(unet|transformer)__?(?P<layer>\w+)")
_TEXT_ENCODER: Final = re.compile(r"text_encoder(_\d)?\.|lora_te\d?_")
_PROCESSOR: Final = re.compile(r"(?P<layer>.+?)(?:\.processor)?\.to_(?P<to>q|k|v|out)_lora\.(?P<side>down|up)\.weight")
_ALPHA: Final = re.compile(r"(?P<layer>.+?)(?:\.lora)?\.alpha")
_LARGEST: Final = 1e9  # of an alpha: beyond any that was ever trained with
_BLOCK: Final = re.compile(r"transformer_blocks\.(\d+)\.")

_LONGEST_PATTERN: Final = 1000
_REPEATED: Final = re.compile(r"\{\d")
_MOST_REPEATED: Final = 2  # of {n}, which are written out in memory: n times n times what they repeat
_OFTEN: Final = re.compile(r"\{[^}]{0,9}\d{3}")
_PATIENCE: Final = 1.0  # seconds: Python's own matcher could take years, and cannot be told to stop

Part = Literal["A", "B", "bias", "alpha"]


@dataclass
class _Layer:
    """What an adapter holds for one layer: the keys of its tensors, and the shape of each."""

    keys: dict[Part, str] = field(default_factory=dict)
    shapes: dict[Part, tuple[int, ...]] = field(default_factory=dict)
    factor: float = 1.0


@dataclass(frozen=True)
class Adapter:
    """An adapter that has been checked against a transformer.

    Attributes:
        entry: What the manifest says of it.
        layers: By the layer's name in the transformer.
        ignored: Tensors of a text encoder, which diffusers leaves out, too.
    """

    entry: Lora
    layers: dict[str, _Layer]
    ignored: int

    @property
    def file(self) -> Path:
        """The safetensors file."""
        return Path(self.entry.path)

    @property
    def changes(self) -> set[str]:
        """The transformer's tensors that it changes."""
        return {
            f"{name}.{kind}"
            for name, layer in self.layers.items()
            for kind in ("weight", "bias")
            if kind == "weight" or "bias" in layer.keys
        }


def read_adapters(
    loras: Iterable[tuple[Path, float]], tensors: dict[str, StoredTensor], progress: Progress
) -> list[Adapter]:
    """Read the headers of adapters and check that each fits the transformer.

    Args:
        loras: Files, or folders with one, and the scale of each.
        tensors: Every tensor of the checkpoint's transformer.
        progress: Told what of an adapter is left out.

    Raises:
        CheckpointError: An adapter is missing, damaged, or of a kind that cannot be merged.
        WrongModelError: It is for another model.
    """
    adapters = [_read_adapter(_file_of(path), scale, tensors) for path, scale in loras]
    for adapter in adapters:
        if adapter.ignored:
            progress.note(f"{adapter.file}: {adapter.ignored} tensors for a text encoder are left out, as in diffusers")
    return adapters


def merge_adapters(
    adapters: Sequence[Adapter], checkpoint: Checkpoint, precision: Precision, folder: Path, progress: Progress
) -> Checkpoint:
    """Return the checkpoint with the weights that adapters change taken from a file in `folder`; see `write_merged`."""
    tensors = checkpoint.tensors("transformer")
    merged = write_merged(adapters, tensors, checkpoint.place, precision, folder, progress)
    return checkpoint.with_made("transformer", merged)


def write_merged(
    adapters: Sequence[Adapter],
    tensors: dict[str, StoredTensor],
    place: Callable[[str], Path],
    precision: Precision,
    folder: Path,
    progress: Progress,
) -> DerivedTensors:
    """Write every weight that the adapters change, merged, to `MERGED` in `folder`.

    Args:
        adapters: In the order in which they are added.
        tensors: Every tensor of the transformer that they change.
        place: Returns where a file that `tensors` names lies.
        precision: The type the pipeline would be loaded in; merged weights are of that type.
        folder: Where the file goes.
        progress: Shows the bytes written.
    """
    dtype = TORCH_DTYPES[precision]
    planned = [PlannedTensor(name, dtype, tensors[name].shape) for name in changed_by(adapters)]

    def merged(tensor: PlannedTensor) -> torch.Tensor:
        stored = tensors[tensor.name]
        weight = load_tensor(place(stored.file), stored).to(dtype)
        layer, _, kind = tensor.name.rpartition(".")
        for adapter in adapters:
            if layer in adapter.layers:
                _add(weight, adapter, adapter.layers[layer], kind)
        return weight

    path = folder / MERGED
    with progress.task("merge LoRA weights", sum(tensor.nbytes for tensor in planned)) as advance:
        digest = write_safetensors(path, planned, merged, advance)
    stat = path.stat()
    entry = WeightFile(MERGED, stat.st_size, digest, stat.st_mtime_ns, in_bundle=True)
    return DerivedTensors(path, entry, stored_tensors(MERGED, planned))


def changed_by(adapters: Iterable[Adapter]) -> list[str]:
    """Return the transformer's tensors that some of the adapters change, in the order they are written."""
    return sorted(set().union(*(adapter.changes for adapter in adapters)))


def _add(weight: torch.Tensor, adapter: Adapter, layer: _Layer, kind: str) -> None:
    """Add an adapter to a weight or bias in place, as peft's ``merge`` does."""
    dtype = weight.dtype
    with safe_open(adapter.file, "pt") as file:
        if kind == "bias":
            if "bias" in layer.keys:
                weight += file.get_tensor(layer.keys["bias"]).to(dtype) * layer.factor
            return
        # Rounded to the pipeline's type first, as diffusers loads it, then multiplied in float32.
        down, up = (file.get_tensor(layer.keys[part]).to(dtype).float() for part in ("A", "B"))
    if down.ndim == 2:
        delta = up @ down
    elif down.shape[2:] == (1, 1):
        delta = (up.flatten(1) @ down.flatten(1))[:, :, None, None]
    else:
        delta = torch.nn.functional.conv2d(down.transpose(0, 1), up).transpose(0, 1)
    weight += (delta * layer.factor).to(dtype)


def _file_of(path: Path) -> Path:
    """Return the safetensors file that a path names, or that a folder holds."""
    if path.suffix in PICKLES:
        raise _pickled(path)
    if path.is_file():
        return path.absolute()
    if not path.is_dir():
        raise CheckpointError(f"there is no LoRA {path}", fix="name a safetensors file, or the folder it is in")
    found = [path / name for name in _FILES if (path / name).is_file()]
    if found:
        return found[0].absolute()
    for file in sorted(path.iterdir()):
        if file.suffix in PICKLES:
            raise _pickled(file)
    raise CheckpointError(f"{path} holds neither {_FILES[0]} nor {_FILES[1]}", fix="name the safetensors file itself")


def _pickled(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path} is a pickle, which is never loaded: it can run any code",
        fix="convert it to safetensors where it is trusted, or fetch the safetensors file",
    )


def _read_adapter(file: Path, scale: float, tensors: dict[str, StoredTensor]) -> Adapter:
    fix = "fetch the file again"
    check_regular(file, CheckpointError, fix=fix)
    says = "is no LoRA that can be read"
    with reading(file, CheckpointError, fix=fix, says=says), safe_open(file, "pt") as opened:
        metadata = opened.metadata() or {}
        shapes = {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}  # noqa: SIM118
        layers, ignored = _layers_of(file, shapes, tensors)
        _check(file, layers, tensors)
        config = _config_of(file, metadata)
        for name, layer in layers.items():
            alpha = _number(file, opened.get_tensor(layer.keys["alpha"]), name) if "alpha" in layer.keys else None
            layer.factor = _factor(file, name, layer.shapes["B"][1], scale, alpha, config)
    return Adapter(Lora(str(file), scale, sha256_of(file)), layers, ignored)


def _number(file: Path, alpha: torch.Tensor, name: str) -> float:
    if alpha.numel() != 1 or alpha.is_complex():
        raise CheckpointError(f"{file}: the alpha of {name} is {list(alpha.shape)} and no number", fix="fetch it again")
    return float(alpha)


def _layers_of(file: Path, shapes: dict[str, tuple[int, ...]], tensors: Iterable[str]) -> tuple[dict[str, _Layer], int]:
    layers: dict[str, _Layer] = {}
    flat = {name.replace(".", "_"): name for name in (tensor.rpartition(".")[0] for tensor in tensors)}
    ignored = 0
    for key in sorted(shapes):
        if _TEXT_ENCODER.match(key):
            ignored += 1
            continue
        name, part = _place_of(file, key)
        if found := _FLAT.fullmatch(name):
            name = flat.get(found["layer"], name)
        layer = layers.setdefault(name, _Layer())
        if part in layer.keys:
            raise CheckpointError(f"{file}: {key} and {layer.keys[part]} are for the same layer", fix="use one adapter")
        layer.keys[part], layer.shapes[part] = key, shapes[key]
    if not layers:
        raise CheckpointError(f"{file} holds nothing for the transformer", fix="use a LoRA of a CogVideoX transformer")
    return layers, ignored


def _place_of(file: Path, key: str) -> tuple[str, Part]:
    """Return the layer that a key is for, and which part of its adapter it is."""
    if "dora_scale" in key or "lora_magnitude_vector" in key or ".lokr_" in key or ".hada_" in key:
        raise CheckpointError(
            f"{file}: {key} is of a DoRA, LoKr or LoHa adapter, and only LoRA is merged",
            fix="fuse it in diffusers, save the pipeline with save_pretrained, and export that checkpoint",
        )
    plain = key.removeprefix("base_model.model.").removeprefix("model.diffusion_model.")
    plain = plain.removeprefix("diffusion_model.").removeprefix("transformer.")
    if found := _NEW.fullmatch(plain):
        if found["kind"] == "weight":
            return found["layer"], "A" if found["side"] == "A" else "B"
        if found["side"] == "B":
            return found["layer"], "bias"
    elif found := _PROCESSOR.fullmatch(plain):
        to = "to_out.0" if found["to"] == "out" else f"to_{found['to']}"
        return f"{found['layer']}.{to}", "A" if found["side"] == "down" else "B"
    elif found := _DOWN_UP.fullmatch(plain):
        return found["layer"], "A" if found["side"] == "down" else "B"
    elif found := _ALPHA.fullmatch(plain):
        return found["layer"], "alpha"
    raise CheckpointError(
        f"{file}: {key} is no key of a LoRA of CogVideoX",
        fix="use one in the form of diffusers (transformer.<layer>.lora_A.weight), PEFT, ComfyUI (diffusion_model.) or "
        "kohya (lora_unet_)",
    )


def _check(file: Path, layers: dict[str, _Layer], tensors: dict[str, StoredTensor]) -> None:
    """Raise unless every layer is there, has both matrices, and they fit."""
    for name, layer in layers.items():
        missing = {"A", "B"} - set(layer.keys)
        if missing:
            raise CheckpointError(
                f"{file} has no lora_{min(missing)} beside {next(iter(layer.keys.values()))}", fix="fetch it again"
            )
        weight = tensors.get(f"{name}.weight")
        if weight is None or ("bias" in layer.keys and f"{name}.bias" not in tensors):
            raise WrongModelError(
                f"{file}: {layer.keys['A']} is for a layer that this checkpoint has not", fix=_remedy(layers)
            )
        down, up = layer.shapes["A"], layer.shapes["B"]
        if not len(down) == len(up) == len(weight.shape) in (2, 4) or up[1] != down[0] or down[0] < 1:
            raise CheckpointError(
                f"{file}: {layer.keys['A']} is {list(down)} and lora_B {list(up)}, which do not go together with a "
                f"weight of {list(weight.shape)}",
                fix="use a LoRA of a CogVideoX transformer",
            )
        if (up[0], *down[1:]) != weight.shape or up[2:] not in ((), (1, 1)):
            raise WrongModelError(
                f"{file}: {layer.keys['A']} is for a weight of {[up[0], *down[1:]]}, the checkpoint's is "
                f"{list(weight.shape)}",
                fix=_remedy(layers),
            )


def _remedy(layers: dict[str, _Layer]) -> str:
    """Name the published models that have the width and depth of an adapter's attention layers."""
    depth = max((int(found[1]) + 1 for name in layers if (found := _BLOCK.match(name))), default=0)
    widths = {layer.shapes["A"][1] for name, layer in layers.items() if "attn1.to_" in name and "A" in layer.shapes}
    fits = [
        model.name
        for model in MODELS.values()
        if widths == {model.num_attention_heads * model.attention_head_dim} and depth <= model.num_layers
    ]
    return f"use it with a checkpoint of {' or '.join(fits)}" if fits else "use the checkpoint it was trained on"


def _config_of(file: Path, metadata: dict[str, str]) -> dict[str, Any]:
    """Return an adapter's LoraConfig: from the header, where diffusers puts it, or from the file that PEFT writes."""
    beside = file.with_name("adapter_config.json")
    with reading(f"the LoRA config of {file}", CheckpointError, fix="fetch it again"):
        if "lora_adapter_metadata" in metadata:
            stored = finite_json(metadata["lora_adapter_metadata"])
            config = {key.removeprefix("transformer."): value for key, value in stored.items()}
        elif file.name == _FILES[1] and beside.is_file():
            config = finite_json(read_whole(beside, CheckpointError, fix="fetch it again"))
        else:
            return {}
        if config.get("use_dora"):
            raise CheckpointError(
                f"{file} is a DoRA, and only LoRA is merged", fix="fuse it in diffusers and save that"
            )
        return dict(config)


def _factor(file: Path, name: str, rank: int, scale: float, alpha: float | None, config: dict[str, Any]) -> float:
    """Return what ``B @ A`` is multiplied by; the order of the operations is peft's ``set_scale``."""
    if alpha is None:
        alpha = rank
        if config:
            alpha = _of_layer(file, config, "alpha_pattern", name, config.get("lora_alpha", rank))
            told = _of_layer(file, config, "rank_pattern", name, config.get("r", rank))
            if told != rank:
                raise CheckpointError(
                    f"{file}: the rank of {name} is {rank}, and {told!s:.80} in its LoRA config", fix="fetch it again"
                )
    if not isinstance(alpha, int | float) or not abs(alpha) < _LARGEST:
        raise CheckpointError(f"{file}: the alpha of {name} is {alpha!s:.80}", fix="fetch it again")
    return scale * alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _of_layer(file: Path, config: dict[str, Any], of: str, name: str, default: Any) -> Any:
    """Return what a LoraConfig's pattern says of a layer: its keys match the end of the layer's name."""
    patterns = config.get(of) or {}
    if not isinstance(patterns, dict):
        raise CheckpointError(f"{file}: {of} in its LoRA config is no table of patterns", fix="fetch it again")
    for key, value in patterns.items():
        says = f"{file}: {of} in its LoRA config has {key!r:.80}"
        if len(key) > _LONGEST_PATTERN or len(_REPEATED.findall(key)) > _MOST_REPEATED or _OFTEN.search(key):
            raise CheckpointError(f"{says}, which is larger than a pattern of layers is", fix="fetch it again")
        try:
            matches = regex.match(rf"(.*\.)?({key})$", name, timeout=_PATIENCE)
        except TimeoutError as error:
            raise CheckpointError(f"{says}, which takes too long to match", fix="write it without nested +") from error
        except (regex.error, RecursionError, OverflowError) as error:
            raise CheckpointError(f"{says}, which is no pattern: {error}", fix="fetch it again") from error
        if matches:
            return value
    return default
