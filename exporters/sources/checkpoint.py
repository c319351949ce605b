"""A checkpoint in diffusers layout: configs read, weight files mapped by their headers, never loaded.

The safetensors format (https://github.com/huggingface/safetensors#format): eight bytes of header length N, N bytes of
JSON that give each tensor's dtype, shape and byte range, then the data.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from cvx_deploy.bounds import finite_json
from cvx_deploy.bundle.safetensors import StoredTensor, read_header
from cvx_deploy.bundle.schema import WeightFile
from cvx_deploy.errors import CheckpointError, WrongModelError
from cvx_deploy.exporters.sources.carried import CarriedHashes
from cvx_deploy.families.cogvideox.models import Limits, Traits, model_with_traits
from cvx_deploy.families.registry import MODELS, family_that_runs
from cvx_deploy.files import sha256_of
from cvx_deploy.reading import read_whole, reading

COMPONENTS = ("text_encoder", "transformer", "vae")
PICKLES = (".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True)
class DerivedTensors:
    """Tensors of a component that were made anew, and the one file outside the checkpoint that holds them."""

    path: Path
    entry: WeightFile
    tensors: dict[str, StoredTensor]


class Checkpoint:
    """A CogVideoX checkpoint folder in diffusers layout.

    Args:
        root: The folder.
        variant: Which weight files to read where a component has several, such as fp16 for ``*.fp16.safetensors``.
        transformer: A fine-tuned transformer in place of the checkpoint's: a folder with ``config.json`` and weights,
            or one that holds such a folder as ``transformer``.

    Attributes:
        family: The model family it is of.
        configs: Of every component, with diffusers' defaults for what its file leaves out.
        notes: Where two of its files disagree, and whose word counted.

    Raises:
        CheckpointError: The folder, a config, a shard or a tensor is missing or damaged.
        WrongModelError: The folder is whole, but another model's.
    """

    def __init__(self, root: Path, variant: str | None = None, transformer: Path | None = None) -> None:
        if not root.is_dir():
            raise CheckpointError(f"there is no checkpoint folder {root}", fix="name one with --checkpoint DIR")
        self.root = root.absolute()
        self.variant = variant
        self.transformer = None if transformer is None else _transformer_folder(transformer)
        self._made: dict[str, DerivedTensors] = {}
        found = self._holds()
        family = family_that_runs(found)
        if family is None:
            raise WrongModelError(
                f"{root} holds {found or 'something without a name'}, not a CogVideoX pipeline",
                fix=f"use a checkpoint of one of {', '.join(MODELS)}",
            )
        self.family = family
        self.notes: list[str] = []
        self.configs = self._configs()
        self.traits = Traits.from_transformer_config(self.configs["transformer"], family.pipelines[str(found)])

    def _holds(self) -> object:
        """Return what the folder says it is: a pipeline's class, or where it is a single network, that one's."""
        if (self.root / "model_index.json").is_file() or not (self.root / "config.json").is_file():
            return self._json("model_index.json").get("_class_name")
        config = self._json("config.json")
        return config.get("_class_name") or config.get("model_type")

    def require_model(self, name: str) -> None:
        """Raise WrongModelError when `name` is a published model's and this checkpoint has other traits."""
        model = MODELS.get(name)
        if model is None or model.traits == self.traits:
            return
        actual = model_with_traits(self.traits)
        told = f"--model {actual.name}" if actual else "--model with a name of your own"
        raise WrongModelError(
            f"{self.root} is {'a ' + actual.name if actual else 'not a ' + name} checkpoint, asked for {name}",
            fix=f"use {told}",
        )

    @cached_property
    def limits(self) -> Limits:
        """What shapes this checkpoint can do."""
        transformer, vae = self.configs["transformer"], self.configs["vae"]
        spatial = 2 ** (len(vae["block_out_channels"]) - 1)
        return Limits(
            spatial=spatial * int(transformer["patch_size"]),
            temporal=int(vae["temporal_compression_ratio"]),
            sample_height=spatial * int(transformer["sample_height"]),
            sample_width=spatial * int(transformer["sample_width"]),
            fixed_size=self.traits.positions == "rope+learned",
            table_size=self.traits.patch_size_t is not None,
        )

    def place(self, file: str) -> Path:
        """Return where a file or folder of the checkpoint lies, its name being relative to the root."""
        for made in self._made.values():
            if file == made.entry.path:
                return made.path
        component, _, name = file.partition("/")
        if component == "transformer" and self.transformer is not None:
            return self.transformer / name
        return self.root / file

    def with_made(self, component: str, made: DerivedTensors) -> "Checkpoint":
        """Return the same checkpoint with some of a component's tensors taken from a file of their own."""
        other = copy.copy(self)
        other._made = self._made | {component: made}
        return other

    def tensors(self, component: str) -> dict[str, StoredTensor]:
        """Return every tensor of a component by name, from the headers of its safetensors files alone."""
        if component not in self._headers:
            found: dict[str, StoredTensor] = {}
            for file in self.weight_files(component):
                if not self.place(file).is_file():
                    raise _missing_shard(self.place(file))
                found.update(read_header(self.place(file), file))
            self._headers[component] = found
        made = self._made.get(component)
        return self._headers[component] | (made.tensors if made is not None else {})

    @cached_property
    def _headers(self) -> dict[str, dict[str, StoredTensor]]:
        return {}

    def weight_files(self, component: str, has: Callable[[str], bool] | None = None) -> list[str]:
        """Return the safetensors files of a component, relative to the checkpoint, in order, be they there or not.

        A component without files of the variant is read from its plain ones, as long as another has some. That is
        diffusers' rule (``variant_compatible_siblings``).

        Args:
            component: Its folder's name.
            has: Whether the checkpoint has a file; without it, whether that file is in the folder.

        Raises:
            CheckpointError: There are no files of the variant, or an index makes no sense.
        """
        has = has or (lambda name: self.place(name).is_file())
        sources = {name: weight_sources(name, self.variant, has) for name in COMPONENTS}
        first = {name: found[0] for name, found in sources.items()}
        if self.variant and not any(f".{self.variant}." in name for name in first.values()):
            raise CheckpointError(
                f"{self.root} has no {self.variant} weight files", fix="leave out --variant, or name another one"
            )
        self._note_ignored(sources[component])
        return self._indexed(first[component]) if first[component].endswith(".json") else [first[component]]

    def _note_ignored(self, sources: list[str]) -> None:
        if len(sources) > 1:
            library = "transformers" if sources[0].startswith("text_encoder/") else "diffusers"
            note = f"note: {self.root} has {' and '.join(sources)}; the first is read, as {library} does"
            self.notes += [] if note in self.notes else [note]

    def weight_file(self, file: str, progress: Callable[[int], None] | None = None) -> WeightFile:
        """Return a weight file's entry for the manifest.

        A hash that the checkpoint carries (see `CarriedHashes`) is trusted when it is younger than the file; else the
        file is hashed, and must agree with the carried one.
        """
        for made in self._made.values():
            if file == made.entry.path:
                return made.entry
        path = self.place(file)
        stat = path.stat()
        carried = self._carried_hashes.of(file) if path == self.root / file else None
        if carried is not None and stat.st_mtime_ns <= carried.written_ns:
            return WeightFile(file, stat.st_size, carried.sha256, stat.st_mtime_ns, in_bundle=False)
        digest = sha256_of(path, progress)
        if carried is not None and carried.sha256 != digest:
            raise CheckpointError(
                f"{path} was altered: its SHA-256 is not the one in {carried.where}",
                fix=f"fetch the file again, or remove {carried.where} if the change was meant",
            )
        return WeightFile(file, stat.st_size, digest, stat.st_mtime_ns, in_bundle=False)

    @cached_property
    def _carried_hashes(self) -> CarriedHashes:
        return CarriedHashes(self.root)

    def _json(self, relative: str) -> dict[str, Any]:
        path = self.place(relative)
        if not path.is_file():
            raise CheckpointError(f"{path} is missing", fix="use a checkpoint in diffusers layout, whole")
        raw = read_whole(path, CheckpointError, fix="fetch the file again")
        with reading(path, CheckpointError, fix="fetch the file again", says="is not readable JSON"):
            content = finite_json(raw)
        if not isinstance(content, dict):
            raise CheckpointError(f"{path} holds no JSON object", fix="fetch the file again")
        return content

    def _configs(self) -> dict[str, dict[str, Any]]:
        """Return the config of every component as the class that ``model_index.json`` gives it reads it."""
        from cvx_deploy.exporters.sources.configs import CLASSES, class_in_index, filled_config, other_class

        index, configs = self._json("model_index.json"), {}
        for component in CLASSES:
            class_name = class_in_index(index, component, self.place("model_index.json"))
            if component == "tokenizer":
                continue
            name = "scheduler_config.json" if component == "scheduler" else "config.json"
            config, path = self._json(f"{component}/{name}"), self.place(f"{component}/{name}")
            note = other_class(component, class_name, config, path, self.place("model_index.json"))
            self.notes += [note] if note else []
            configs[component] = filled_config(component, class_name, config, path)
        return configs

    def _indexed(self, index: str) -> list[str]:
        """Return the files that an index names."""
        folder = self.place(index).parent
        weight_map = self._json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"the index of {folder} has no weight_map", fix="fetch the index file again")
        names = sorted({str(name) for name in weight_map.values()})
        for name in names:
            if "/" in name or name in ("", ".", ".."):
                raise CheckpointError(
                    f"the index of {folder} names {name!r}, outside it", fix="do not use this checkpoint"
                )
        return [f"{index.partition('/')[0]}/{name}" for name in names]


def weight_sources(component: str, variant: str | None, has: Callable[[str], bool]) -> list[str]:
    """Return what there is to read a component's weights from, indexes and single files, the one that counts first.

    transformers takes a single file before an index (``_get_resolved_checkpoint_files``), diffusers an index before a
    single file, with an older name for the index of a variant (``_fetch_index_file_legacy``); both take the variant's
    only, where a component has any. Of a component without weights the name that is missing is returned.
    """
    stem = "model" if component == "text_encoder" else "diffusion_pytorch_model"
    whole = f"{component}/{stem}.safetensors"
    of_variant = [
        f"{whole}.index.{variant}.json",
        f"{whole}.{variant}.index.json",
        f"{component}/{stem}.{variant}.safetensors",
    ]
    for names in (of_variant if variant else [], [f"{whole}.index.json", whole]):
        if component == "text_encoder":
            names.reverse()
        if found := [name for name in names if has(name)]:
            return found
    return [whole]


@contextlib.contextmanager
def sensible_config(folder: Path) -> Iterator[None]:
    """Turn whatever torch, diffusers and transformers raise on a config that makes no sense into one failure.

    They raise nearly every built-in exception there is, and some of their own.
    """
    config = f"no network can be built from {folder / 'config.json'}"
    with reading(config, CheckpointError, fix="fetch the file again", says=""):
        yield


def _transformer_folder(folder: Path) -> Path:
    for found in (folder / "transformer", folder):
        if (found / "config.json").is_file():
            return found.absolute()
    raise CheckpointError(
        f"there is no transformer in {folder}: neither it nor a folder transformer in it has a config.json",
        fix="name a folder that save_pretrained wrote",
    )


def _missing_shard(path: Path) -> CheckpointError:
    pickles = sorted(file.name for file in path.parent.glob("*") if file.suffix in PICKLES)
    if pickles:
        return only_pickles(str(path.parent), pickles[0])
    return CheckpointError(f"the weight file {path} is missing", fix="fetch the file again")


def only_pickles(where: str, name: str) -> CheckpointError:
    """Return the failure of a component that has no weights but pickled ones, `name` one of them."""
    return CheckpointError(
        f"{where} has only pickled weights ({name}), which are never loaded: a pickle can run any code",
        fix="convert them to safetensors where they are trusted (save_pretrained), or fetch safetensors files",
    )
