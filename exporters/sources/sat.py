"""SAT checkpoints of the original CogVideo repository, rewritten in diffusers layout.

SAT keeps a network as one pickled state dict with names of its own; queries, keys and values are one tensor there, and
so are the modulations of both norms of a block. Only tensors are unpickled (``weights_only``), mapped from the file,
and written one at a time. Which tensors there must be, and their shapes, comes from the base checkpoint's configs.

How the names correspond is also stated in diffusers' ``scripts/convert_cogvideox_to_diffusers.py`` and CogVideo's
``tools/convert_weight_sat2hf.py``.
"""

import math
import pickle
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from cvx_deploy.bundle.opened import HASHES
from cvx_deploy.errors import CheckpointError, WrongModelError
from cvx_deploy.exporters.sources.checkpoint import COMPONENTS, Checkpoint, sensible_config
from cvx_deploy.exporters.sources.synth import network_on_meta
from cvx_deploy.exporters.sources.weights import (
    FULL_SHARD_BYTES,
    TYPE_NAMES,
    PlannedTensor,
    split_into_shards,
    write_hashed,
    write_safetensors,
)
from cvx_deploy.files import place_file, require_space, staged_directory, sums_of
from cvx_deploy.progress import Advance, Progress, SilentProgress
from cvx_deploy.reading import reading

State = dict[str, torch.Tensor]

_TRANSFORMER: Final = "model.diffusion_model."
_BLOCK: Final = r"transformer_blocks\.(\d+)\."
_LAYER: Final = r"transformer.layers.\1."
_ADALN: Final = "mixins.adaln_layer."
# The twelve modulations of a block, in SAT's order: shift, scale and gate of attention and of the MLP for the video,
# then for the text. diffusers' norm1 has attention's, its norm2 the MLP's.
_ATTENTION_PARTS: Final = (0, 1, 2, 6, 7, 8)
_MLP_PARTS: Final = (3, 4, 5, 9, 10, 11)
# diffusers' name of a layer, SAT's, and where SAT's tensor is several in one, of how many parts which.
_TRANSFORMER_LAYERS: Final[tuple[tuple[str, str, int, tuple[int, ...]], ...]] = (
    (_BLOCK + r"norm1\.norm", _LAYER + "input_layernorm", 1, (0,)),
    (_BLOCK + r"norm2\.norm", _LAYER + "post_attention_layernorm", 1, (0,)),
    (_BLOCK + r"norm1\.linear", _ADALN + r"adaLN_modulations.\1.1", 12, _ATTENTION_PARTS),
    (_BLOCK + r"norm2\.linear", _ADALN + r"adaLN_modulations.\1.1", 12, _MLP_PARTS),
    (_BLOCK + r"attn1\.to_q", _LAYER + "attention.query_key_value", 3, (0,)),
    (_BLOCK + r"attn1\.to_k", _LAYER + "attention.query_key_value", 3, (1,)),
    (_BLOCK + r"attn1\.to_v", _LAYER + "attention.query_key_value", 3, (2,)),
    (_BLOCK + r"attn1\.to_out\.0", _LAYER + "attention.dense", 1, (0,)),
    (_BLOCK + r"attn1\.norm_q", _ADALN + r"query_layernorm_list.\1", 1, (0,)),
    (_BLOCK + r"attn1\.norm_k", _ADALN + r"key_layernorm_list.\1", 1, (0,)),
    (_BLOCK + r"ff\.net\.0\.proj", _LAYER + "mlp.dense_h_to_4h", 1, (0,)),
    (_BLOCK + r"ff\.net\.2", _LAYER + "mlp.dense_4h_to_h", 1, (0,)),
    (r"norm_final", "transformer.final_layernorm", 1, (0,)),
    (r"norm_out\.norm", "mixins.final_layer.norm_final", 1, (0,)),
    (r"norm_out\.linear", "mixins.final_layer.adaLN_modulation.1", 1, (0,)),
    (r"proj_out", "mixins.final_layer.linear", 1, (0,)),
    (r"patch_embed\.(proj|text_proj)", r"mixins.patch_embed.\1", 1, (0,)),
    (r"time_embedding\.linear_1", "time_embed.0", 1, (0,)),
    (r"time_embedding\.linear_2", "time_embed.2", 1, (0,)),
    (r"ofs_embedding\.linear_1", "ofs_embed.0", 1, (0,)),
    (r"ofs_embedding\.linear_2", "ofs_embed.2", 1, (0,)),
)
_ADAPTER: Final = re.compile(r"\.matrix_[AB]\.")
_POSITIONS: Final = "mixins.pos_embed.pos_embedding"
# What SAT keeps and diffusers computes, or has in other components.
_UNUSED: Final = {
    "transformer": re.compile(
        r"mixins\.pos_embed\..*|transformer\.(word_embeddings|position_embeddings)\..*|.*embed_tokens.*"
        r"|.*freqs_(sin|cos)|(conditioner|first_stage_model)\..*"
    ),
    "vae": re.compile(r"loss\..*"),
}


@dataclass(frozen=True)
class _Source:
    """Where in a SAT state dict a tensor comes from: rows of one tensor, which is cut into equal parts."""

    key: str
    cut: int = 1
    parts: tuple[int, ...] = (0,)

    def take(self, state: State, shape: tuple[int, ...]) -> torch.Tensor:
        """Return the tensor, copied from the mapped file if it is several parts.

        SAT's later code keeps the patch embedding's convolution as a linear layer over the same numbers, hence the
        reshape.
        """
        pieces = state[self.key].chunk(self.cut)
        tensor = torch.cat([pieces[part] for part in self.parts]) if len(self.parts) > 1 else pieces[self.parts[0]]
        return tensor.reshape(shape)

    def fits(self, state: State, shape: tuple[int, ...]) -> bool:
        """Whether the stored tensor has the numbers for a tensor of that shape."""
        rows = shape[0] * self.cut // len(self.parts)
        stored = tuple(state[self.key].shape)
        if "patch_embed.proj" in self.key:
            return stored[0] == shape[0] and math.prod(stored) == math.prod(shape)
        return stored == (rows, *shape[1:])


def checkpoint_from_sat(
    transformer: Path | None,
    vae: Path | None,
    base: Path,
    output: Path,
    progress: Progress | None = None,
) -> Path:
    """Write a checkpoint in diffusers layout whose transformer, VAE or both come from SAT files.

    Args:
        transformer: SAT's ``mp_rank_00_model_states.pt``, or None to keep the base's transformer.
        vae: SAT's ``3d-vae.pt``, likewise.
        base: A checkpoint in diffusers layout of the same model, for the configs and everything else.
        output: A folder that does not exist yet, or is empty.
        progress: Shows the weight bytes written.

    Returns:
        `output`.

    Raises:
        CheckpointError: A file is missing, holds more than tensors, or not the network's tensors.
        WrongModelError: A file is another model's.
        OutputError: `output` exists, cannot be written, or the disk has too little room.
    """
    progress = progress or SilentProgress()
    source = Checkpoint(base)
    given = {"transformer": transformer, "vae": vae}
    networks = {name: _Network(name, path, source) for name, path in given.items() if path is not None}
    if not networks:
        raise CheckpointError("there is nothing to convert", fix="name a file with --transformer or --vae")
    kept = [file for component in COMPONENTS if component not in networks for file in _files(source, component)]
    small = [file for file in _small_files(source) if file.partition("/")[0] not in networks]
    small += [f"{component}/config.json" for component in networks]
    with staged_directory(output, replace=False) as folder:
        require_space(folder, sum(network.nbytes for network in networks.values()))
        hashes: dict[str, str] = {}
        with progress.task("write weights", sum(network.nbytes for network in networks.values())) as advance:
            for network in networks.values():
                hashes |= network.write(folder, advance)
        for file in (*small, *kept):
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
        for file in small:
            place_file(source.place(file), folder / file)
        size = sum(source.place(file).stat().st_size for file in kept)
        with progress.task("hash the other weights", size) as advance:
            hashes |= {file: source.weight_file(file, advance).sha256 for file in kept}
        with progress.task("place the other weights", size) as advance:
            for file in kept:
                place_file(source.place(file), folder / file, advance)
        write_hashed(folder / HASHES, [sums_of(dict(sorted(hashes.items())))])
    return output


def _files(source: Checkpoint, component: str) -> list[str]:
    """Return the weight files of a component that are read."""
    return sorted({tensor.file for tensor in source.tensors(component).values()})


def _small_files(source: Checkpoint) -> Iterator[str]:
    """Yield a checkpoint's configs, tokenizer and indexes, relative to it."""
    for folder in ("", "scheduler", "tokenizer", *COMPONENTS):
        for path in sorted((source.root / folder).iterdir()):
            if path.is_file() and path.suffix in {".json", ".model", ".txt"}:
                yield f"{folder}/{path.name}".lstrip("/")


class _Network:
    """One network of a SAT file, checked against the config of the base's."""

    def __init__(self, component: str, path: Path, base: Checkpoint) -> None:
        self.component = component
        self.path = path
        config = base.configs[component]
        with sensible_config(base.place(component)):
            wanted = network_on_meta(component, config).state_dict()
        state = _read(path)
        if component == "transformer":
            state = {key.removeprefix(_TRANSFORMER): value for key, value in state.items()}
            source_of: Callable[[str], _Source] = _transformer_source
        else:
            last = len(config["block_out_channels"]) - 1
            source_of = lambda name: _vae_source(name, last)  # noqa: E731
        self.sources = {name: source_of(name) for name in wanted}
        self.state = state
        self._check({name: tuple(tensor.shape) for name, tensor in wanted.items()})
        self.tensors = {
            name: PlannedTensor(name, state[source.key].dtype, tuple(wanted[name].shape))
            for name, source in self.sources.items()
        }

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def write(self, folder: Path, advance: Advance) -> dict[str, str]:
        """Write its weight files and their index, and return the hashes of the former by path."""
        meta = {
            name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for name, tensor in self.tensors.items()
        }
        files, index = split_into_shards(self.component, meta, FULL_SHARD_BYTES)
        hashes = {}
        for file, names in files.items():
            path = f"{self.component}/{file}"
            hashes[path] = write_safetensors(
                folder / path, [self.tensors[name] for name in names], self._value, advance
            )
        for path, content in index.items():
            write_hashed(folder / path, [content])
        return hashes

    def _value(self, tensor: PlannedTensor) -> torch.Tensor:
        return self.sources[tensor.name].take(self.state, tensor.shape)

    def _check(self, shapes: dict[str, tuple[int, ...]]) -> None:
        fix = "use the file and the base checkpoint of the same model"
        adapters = [key for key in self.state if _ADAPTER.search(key)]
        if adapters:  # before anything else: beside them every layer has another name, too
            raise WrongModelError(
                f"{self.path}: {adapters[0]} is of LoRA training, and no weight of the {self.component}",
                fix="write the LoRA out with CogVideo's tools/export_sat_lora_weight.py, and export with --lora",
            )
        for name, source in self.sources.items():
            if source.key not in self.state:
                raise WrongModelError(f"{self.path} has no {source.key}, which is to become {name}", fix=fix)
            stored = self.state[source.key]
            if not source.fits(self.state, shapes[name]):
                raise WrongModelError(
                    f"{self.path}: {source.key} is {list(stored.shape)}, which makes no {name} of {list(shapes[name])}",
                    fix=fix,
                )
            if not stored.dtype.is_floating_point or stored.dtype not in TYPE_NAMES:
                raise CheckpointError(
                    f"{self.path}: {source.key} is {stored.dtype}", fix="use a file of floating point weights"
                )
        used = {source.key for source in self.sources.values()}
        for key in self.state:
            if key not in used and not _UNUSED[self.component].fullmatch(key):
                raise WrongModelError(f"{self.path}: {key} has no place in the {self.component}", fix=fix)


def _transformer_source(name: str) -> _Source:
    if name == "patch_embed.pos_embedding":
        return _Source(_POSITIONS)
    layer, _, kind = name.rpartition(".")
    for pattern, sat, cut, parts in _TRANSFORMER_LAYERS:
        if found := re.fullmatch(pattern, layer):
            return _Source(f"{found.expand(sat)}.{kind}", cut, parts)
    raise CheckpointError(f"SAT has no name for {name}", fix="report this, with the base checkpoint's config.json")


def _vae_source(name: str, last: int) -> _Source:
    """Return SAT's name in the VAE; its upper blocks are counted from the other end."""
    name = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", name)
    name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", name)
    name = re.sub(r"up_blocks\.(\d+)\.resnets", lambda found: f"up.{last - int(found[1])}.block", name)
    name = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda found: f"up.{last - int(found[1])}.upsample", name)
    name = re.sub(r"mid_block\.resnets\.(\d+)", lambda found: f"mid.block_{int(found[1]) + 1}", name)
    return _Source(name.replace("conv_shortcut", "nin_shortcut"))


def _read(path: Path) -> State:
    """Map a SAT file and return its tensors; what is not a tensor, and is not unpickled safely, is refused."""
    if not path.is_file():
        raise CheckpointError(f"there is no file {path}", fix="name SAT's .pt file")
    again = "fetch it again, or save its state dict anew where it is trusted"
    says = "is no file that torch.save has written since version 1.6, or is damaged"
    with reading(path, CheckpointError, fix=again, says=says):
        try:
            content: Any = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except pickle.UnpicklingError as error:  # whose text advises to load it unsafely
            raise CheckpointError(
                f"{path} holds more than tensors, or is damaged, and pickles that can run code are never loaded",
                fix="save its state dict alone, where it is trusted: torch.save(state_dict, FILE)",
            ) from error
    for wrapper in ("model", "module", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict) or not content:
        raise CheckpointError(f"{path} holds no state dict", fix="name SAT's .pt file")
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            raise CheckpointError(f"{path}: {key} is no tensor", fix="name SAT's .pt file of weights")
    return content
