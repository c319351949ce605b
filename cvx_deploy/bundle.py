"""The bundle: one folder that holds everything the runtime needs, described by its manifest ``bundle.json``.

Every path in a bundle stays inside it, but for one kind: the manifest's weight table may say that a weight file lies in
the checkpoint it was exported from. ONNX files name their weights by that table's plain names.
"""

import hashlib
import math
import os
import re
import shlex
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, TypedDict, TypeGuard

import msgspec

from cvx_deploy.bounds import (
    MOST_LATENTS,
    MOST_VALUES,
    Factor,
    Positive,
    PositiveFactor,
    Size,
    check_video,
)
from cvx_deploy.errors import BundleError, OutputError, ShapeError
from cvx_deploy.files import sha256_of
from cvx_deploy.models import SchedulerKind, Shape, Traits
from cvx_deploy.progress import Progress
from cvx_deploy.reading import read_whole, reading

MANIFEST = "bundle.json"
HASHES = "SHA256SUMS"
SCHEMA_VERSION = 4

Precision = Literal["fp32", "fp16", "bf16"]
SchemeName = Literal["int8", "int8wo", "int4wo", "fp8"]
DType = Literal["float32", "float16", "int64"]
_TRANSFORMER = "transformer/"
_AGAIN = "export the bundle again; run: cvx-deploy export --help"
_SUFFIXES = {".json", ".onnx", ".safetensors"}
_OF_A_BUNDLE = {"engines", HASHES}
_SYMBOL = re.compile(r"([1-9]\d{0,4}\*)?[a-z_]{1,40}")
_MOST_AXES = 8


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of a network.

    Attributes:
        name: Its name in the ONNX graph.
        dtype: Its element type at the network's boundary (bfloat16 lives inside only).
        shape: Sizes, or symbols such as ``batch`` and ``8*latent_height`` where the size is chosen at load time.
        layout: What the axes are, a letter each, such as BFCHW.
    """

    name: str
    dtype: DType
    shape: tuple[int | str, ...]
    layout: str

    def __post_init__(self) -> None:
        if len(self.layout) != len(self.shape):
            raise ValueError(f"layout {self.layout} does not name the {len(self.shape)} axes of {self.name}")
        for size in self.shape:
            if size < 1 if isinstance(size, int) else not _SYMBOL.fullmatch(size):
                raise ValueError(f"{self.name} has an axis of size {size}")
            if isinstance(size, int) and size > MOST_VALUES:
                raise ValueError(f"{self.name} has an axis of size {size}")
        if len(self.shape) > _MOST_AXES or math.prod(filter(_is_int, self.shape)) > MOST_VALUES:
            raise ValueError(f"{self.name} has more than {_MOST_AXES} axes or {MOST_VALUES:,} values")

    @property
    def symbols(self) -> set[str]:
        """What its sizes depend on: batch, latent_height, ..."""
        return {size.rpartition("*")[2] for size in self.shape if isinstance(size, str)}

    def resolve(self, sizes: dict[str, int]) -> tuple[int, ...]:
        """Return the shape in numbers; `sizes` gives the symbols, and a symbol ``8*x`` is eight times ``x``."""
        return tuple(size if isinstance(size, int) else dimension(size, sizes) for size in self.shape)


def dimension(symbol: str, sizes: dict[str, int]) -> int:
    """Return the value of a symbol: a key of `sizes`, or a whole multiple of one, written ``8*key``."""
    factor, _, name = symbol.rpartition("*")
    if name not in sizes:
        raise BundleError(f"the manifest gives an axis the size {symbol}, which means nothing there", fix=_AGAIN)
    return int(factor or 1) * sizes[name]


@dataclass(frozen=True)
class StoredFile:
    """A file inside the bundle: its relative path, bytes and hash."""

    path: str
    size: Size
    sha256: str


@dataclass(frozen=True)
class WeightFile:
    """A safetensors file that ONNX graphs point into.

    Attributes:
        path: Relative to the bundle when `in_bundle`, else to the checkpoint.
        mtime_ns: When a file outside still has this time and size, it is taken to be the one that was hashed.
    """

    path: str
    size: Size
    sha256: str
    mtime_ns: int
    in_bundle: bool


@dataclass(frozen=True)
class Quantization:
    """How the linear layers of a network were quantized.

    Attributes:
        layers: How many were.
        excluded: Places, such as ``transformer_blocks.0.attn1``, whose layers were left as they are.
        attention: Whether attention multiplies in 8 bits too.
        calibration: The absolute path of the table with the activations' ranges, and its SHA-256; None where the scheme
            needs none.
    """

    scheme: SchemeName
    layers: Positive
    excluded: tuple[str, ...] = ()
    attention: bool = False
    calibration: tuple[str, str] | None = None


@dataclass(frozen=True)
class Network:
    """One ONNX graph and its interface.

    Attributes:
        state: Input name to output name, for tensors that one run hands to the next (the VAE's causal caches).
        precision: What it computes in, but for what `quantization` says.
    """

    file: StoredFile
    inputs: Annotated[tuple[TensorSpec, ...], msgspec.Meta(min_length=1)]
    outputs: Annotated[tuple[TensorSpec, ...], msgspec.Meta(min_length=1)]
    weights: tuple[str, ...]
    state: dict[str, str]
    precision: Precision
    quantization: Quantization | None = None

    def __post_init__(self) -> None:
        if not {spec.name for spec in self.outputs}.issuperset(self.state.values()):
            raise ValueError("its state names what is not among its outputs")


@dataclass(frozen=True)
class Vae:
    """What the runtime must know of the VAE.

    Attributes:
        scaling_factor: Latents are multiplied by it on their way into the transformer.
        invert_scale_latents: Image latents are divided by it instead.
        latent_channels: Channels of a latent frame.
        spatial: Pixels a latent spans in height and in width.
        temporal: Frames a latent frame spans.
        tile_height: Tile size in pixels when tiling is on; `tile_width` likewise.
    """

    scaling_factor: PositiveFactor
    invert_scale_latents: bool
    latent_channels: Positive
    spatial: Positive
    temporal: Positive
    tile_height: Positive
    tile_width: Positive


@dataclass(frozen=True)
class ShapeEntry:
    """One video size a bundle makes, and what it is made with.

    Attributes:
        networks: Role (text_encoder, transformer, vae_decoder_first, ...) to the name of the network that plays it.
    """

    shape: Shape
    networks: dict[str, str]

    def __post_init__(self) -> None:
        shape = self.shape
        if min(shape.frames, shape.height, shape.width) < 1:
            raise ValueError(f"it names the shape {shape}")
        check_video(shape.frames, shape.height, shape.width)


class SchedulerEntry(TypedDict):
    """The sampler the checkpoint recommends, and diffusers' ``scheduler_config.json``."""

    kind: SchedulerKind
    config: dict[str, Any]


@dataclass(frozen=True)
class Lora:
    """An adapter that was merged into the transformer.

    Attributes:
        path: The absolute path of its file.
        scale: What it was multiplied by, besides what the file itself says.
    """

    path: str
    scale: Factor
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """Everything ``bundle.json`` says.

    Attributes:
        model: The published model this is, or the name it was exported under.
        shapes: The video sizes it makes; the first is the default.
        fps: Frames a second of the finished video.
        networks: Every network by its name; sizes that need the same graph share it.
        precision: What was asked for: a type, a scheme, or one for each network; see `cvx_deploy.quantize.recipe`.
        checkpoint: The absolute folder the weights outside the bundle lie in.
        weights: Plain name, as ONNX files use it, to file.
        transformer: The absolute folder of a fine-tuned transformer that stands in for the checkpoint's.
        loras: What was merged into the transformer, in this order.
        provenance: Where the checkpoint is from (source, revision, variant), and the versions of the tools that made
            the bundle.
    """

    schema_version: int
    model: str
    traits: Traits
    shapes: Annotated[tuple[ShapeEntry, ...], msgspec.Meta(min_length=1)]
    fps: Annotated[int, msgspec.Meta(gt=0, le=1000)]
    precision: str
    text_length: Annotated[int, msgspec.Meta(gt=1, le=1 << 16)]
    vae: Vae
    scheduler: SchedulerEntry
    tokenizer: StoredFile
    networks: dict[str, Network]
    checkpoint: str
    weights: dict[str, WeightFile]
    provenance: dict[str, str]
    transformer: str | None = None
    loras: tuple[Lora, ...] = ()

    def __post_init__(self) -> None:
        if len({entry.shape for entry in self.shapes}) < len(self.shapes):
            raise ValueError("it names a shape twice")
        for entry in self.shapes:
            if self._latents(entry.shape) > MOST_LATENTS:
                raise ValueError(f"its latents at {entry.shape} have more than {MOST_LATENTS:,} values")
            for role, name in entry.networks.items():
                if name not in self.networks:
                    raise ValueError(f"its {role} at {entry.shape} is {name}, which is not among its networks")

    def _latents(self, shape: Shape) -> int:
        """Return how many values the latents of a video have, at most."""
        vae = self.vae
        plane = -(-shape.height // vae.spatial) * -(-shape.width // vae.spatial)
        return (-(-shape.frames // vae.temporal) + (self.traits.patch_size_t or 1)) * vae.latent_channels * plane

    @property
    def computes_in(self) -> set[Precision]:
        """The types its networks compute in."""
        return {network.precision for network in self.networks.values()}

    @property
    def multiplies_in(self) -> set[SchemeName]:
        """The schemes of its networks that take 8-bit instructions: not those that shrink weights only."""
        found = [network.quantization for network in self.networks.values() if network.quantization is not None]
        schemes = {quantization.scheme for quantization in found} & {"int8", "fp8"}
        return schemes | ({"fp8"} if any(quantization.attention for quantization in found) else set())

    def to_json(self) -> bytes:
        """Return the text of ``bundle.json``."""
        return msgspec.json.format(msgspec.json.encode(asdict(self)), indent=2) + b"\n"


@dataclass(frozen=True)
class Bundle:
    """An opened bundle, whose small files have been checked, seen at one of its shapes.

    Attributes:
        path: Its folder.
        index: Which of the manifest's shapes `shape` and `network` speak of.
    """

    path: Path
    manifest: Manifest
    index: int = 0

    @classmethod
    def open(cls, path: Path) -> "Bundle":
        """Read and check a bundle.

        Every file inside the bundle must be there, stay inside it, and have its size and hash. Weight files are
        checked by `weight_path`, when a network that needs them is loaded.

        Raises:
            BundleError: Which file is missing, truncated, altered or foreign, and how to mend it.
        """
        bundle = cls.read(path)
        for stored in bundle.small_files:
            bundle.check_file(stored)
        return bundle

    @classmethod
    def read(cls, path: Path) -> "Bundle":
        """Read the manifest alone; what it names is not looked at."""
        return cls(path, _read_manifest(path))

    @property
    def small_files(self) -> tuple[StoredFile, ...]:
        """Every file of the bundle but its manifest and its weights."""
        return (self.manifest.tokenizer, *(network.file for network in self.manifest.networks.values()))

    def check_file(self, stored: StoredFile) -> None:
        """Raise BundleError unless a file of the bundle is there, inside, with its size and hash."""
        path = self.inside(stored.path)
        _check_size(path, stored.size, self.remedy)
        if sha256_of(path) != stored.sha256:
            raise BundleError(
                f"{path} was altered, or belongs to another bundle (its SHA-256 differs)", fix=self.remedy
            )

    def content(self, stored: StoredFile) -> bytes:
        """Return the bytes of a small file of the bundle: those that were hashed, and no others that came since."""
        path = self.inside(stored.path)
        content = read_whole(path, BundleError, fix=self.remedy, limit=stored.size)
        if hashlib.sha256(content).hexdigest() != stored.sha256:
            raise BundleError(
                f"{path} was altered, or belongs to another bundle (its SHA-256 differs)", fix=self.remedy
            )
        return content

    @property
    def remedy(self) -> str:
        """How to make this bundle anew."""
        return "run: " + self.export_command(self.shapes)

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """Every video size the bundle makes."""
        return tuple(entry.shape for entry in self.manifest.shapes)

    @property
    def shape(self) -> Shape:
        """The video size the bundle is seen at."""
        return self.manifest.shapes[self.index].shape

    def at(self, shape: Shape) -> "Bundle":
        """Return the same bundle seen at another of its shapes."""
        if shape not in self.shapes:
            raise ShapeError(
                f"{self.path} makes no videos of {shape} (it makes {', '.join(map(str, self.shapes))})",
                fix="run: " + self.export_command((*self.shapes, shape)),
            )
        return replace(self, index=self.shapes.index(shape))

    def export_command(self, shapes: Iterable[Shape]) -> str:
        """Return the command that makes this bundle, at these shapes."""
        manifest = self.manifest
        options = [
            ("model", manifest.model),
            ("checkpoint", manifest.provenance.get("source", manifest.checkpoint)),
            *((name, manifest.provenance[name]) for name in ("revision", "variant") if name in manifest.provenance),
            *(("shape", shape) for shape in shapes),
            ("precision", manifest.precision),
            ("output", self.path),
        ]
        if manifest.transformer is not None:
            options.append(("transformer", manifest.transformer))
        options += _quantizing(manifest.networks.values())
        options += [("lora", f"{lora.path}:{lora.scale!r}") for lora in manifest.loras]
        words = [word for name, value in options for word in (f"--{name}", str(value))]
        copied = all(entry.in_bundle for entry in manifest.weights.values())
        attention = any(
            network.quantization and network.quantization.attention for network in self.manifest.networks.values()
        )
        flags = {"--copy-weights": copied, "--quantize-attention": attention}
        return shlex.join(["cvx-deploy", "export", *words, *(flag for flag, is_set in flags.items() if is_set)])

    def inside(self, relative: str) -> Path:
        """Return the absolute path of a file of the bundle, refusing one that leaves it."""
        return _contained(self.path, relative, f"the manifest of {self.path}")

    def onnx_path(self, role: str) -> Path:
        """Return where the ONNX file of a role's network lies."""
        return self.inside(self.network(role).file.path)

    def onnx_bytes(self, role: str) -> bytes:
        """Return the ONNX file of a role's network, as it was hashed."""
        return self.content(self.network(role).file)

    def has(self, role: str) -> bool:
        """Whether this shape needs a network of that role."""
        return role in self.manifest.shapes[self.index].networks

    def network(self, role: str) -> Network:
        """Return the network that plays a role at this shape, or say that there is none."""
        return self.manifest.networks[self.network_name(role)]

    def network_name(self, role: str) -> str:
        """Return the name of the network that plays a role at this shape, or say that there is none."""
        networks = self.manifest.shapes[self.index].networks
        if role not in networks:
            have = ", ".join(sorted(networks))
            raise BundleError(f"{self.path} has no network {role} at {self.shape} (it has {have})", fix=self.remedy)
        return networks[role]

    def weight_path(self, name: str, progress: Progress) -> Path:
        """Return where a weight file lies, after making sure that it is the one the bundle was made from.

        A file whose time stamp changed since it was hashed is hashed again.
        """
        path = self.locate_weight(name)
        if path.stat().st_mtime_ns != self.manifest.weights[name].mtime_ns:
            self.check_weight(name, progress)
        return path

    def check_weight(self, name: str, progress: Progress) -> None:
        """Hash a weight file, whatever its time stamp, and raise BundleError when it was altered."""
        path, entry = self.locate_weight(name), self.manifest.weights[name]
        with progress.task(f"check {path.name}", entry.size) as advance:
            found = sha256_of(path, advance)
        if found != entry.sha256:
            raise BundleError(
                f"{path} was altered since the bundle {self.path} was made", fix=self._weight_remedy(name)
            )

    def locate_weight(self, name: str) -> Path:
        """Return where a weight file lies, with the right size; its content is not looked at."""
        if name not in self.manifest.weights:
            raise BundleError(f"{self.path}: no weight file named {name} in the manifest", fix=self.remedy)
        entry = self.manifest.weights[name]
        root, relative = self.weight_home(entry)
        path = _contained(root, relative, f"the weight table of {self.path}", resolve=entry.in_bundle)
        _check_size(path, entry.size, self._weight_remedy(name))
        return path

    def weight_home(self, entry: WeightFile) -> tuple[Path, str]:
        """Return the folder that a weight file lies in, and its path there."""
        if entry.in_bundle:
            return self.path, entry.path
        if self.manifest.transformer is not None and entry.path.startswith(_TRANSFORMER):
            return Path(self.manifest.transformer), entry.path.removeprefix(_TRANSFORMER)
        return Path(self.manifest.checkpoint), entry.path

    def _weight_remedy(self, name: str) -> str:
        entry = self.manifest.weights[name]
        if entry.in_bundle:
            return self.remedy
        root, relative = self.weight_home(entry)
        if relative != entry.path:
            return f"put the transformer back at {root}, or {self.remedy}"
        if "revision" in self.manifest.provenance:
            return self.remedy  # fetches it again
        return f"put the checkpoint back at {root}, or run the command again with --checkpoint DIR"

    def with_checkpoint(self, checkpoint: Path) -> "Bundle":
        """Return the same bundle with its outside weights taken from another copy of the checkpoint."""
        place = str(checkpoint.absolute())
        kept = {key: value for key, value in self.manifest.provenance.items() if key != "revision"}
        return replace(self, manifest=replace(self.manifest, checkpoint=place, provenance=kept | {"source": place}))


def _quantizing(networks: Iterable[Network]) -> list[tuple[str, object]]:
    """Return the options of an export that say how networks were quantized, besides the precision."""
    found = [network.quantization for network in networks if network.quantization is not None]
    tables = {quantization.calibration[0] for quantization in found if quantization.calibration is not None}
    excluded = dict.fromkeys(place for quantization in found for place in quantization.excluded)
    places = [*excluded] or (["none"] if found else [])  # said, since the default depends on the model
    return [*(("calibration", table) for table in tables), *(("exclude", place) for place in places)]


def may_replace(output: Path) -> bool:
    """Whether a folder is a bundle, which is replaced as a whole; raise when it holds anything of the user's too."""
    if not (output / MANIFEST).is_file():
        return False
    for entry in output.iterdir():
        if entry.name not in _OF_A_BUNDLE and not (entry.is_file() and entry.suffix in _SUFFIXES):
            raise OutputError(
                f"{output} holds {entry.name}, which is not of a bundle, and would be lost",
                fix="move it away, or choose another --output",
            )
    return True


def _read_manifest(path: Path) -> Manifest:
    file = path / MANIFEST
    if not path.is_dir():
        raise BundleError(f"there is no bundle at {path}", fix="run: cvx-deploy export, or name one with --bundle DIR")
    if not file.is_file():
        raise BundleError(f"{path} is not a bundle: it has no {MANIFEST}", fix="name a bundle with --bundle DIR")
    return manifest_from_json(read_whole(file, BundleError, fix=_AGAIN), str(file))


def manifest_from_json(text: bytes, file: str) -> Manifest:
    """Read the text of a ``bundle.json``, which lies at `file`, strictly; see `Manifest.to_json`.

    Raises:
        BundleError: It is damaged, or of another schema version.
    """
    with reading(file, BundleError, fix=_AGAIN):
        raw = msgspec.json.decode(text)
        version = raw.get("schema_version") if isinstance(raw, dict) else None
        if version != SCHEMA_VERSION:
            raise BundleError(
                f"{file} has schema version {version}, this program reads {SCHEMA_VERSION}",
                fix="export the bundle again with this version of cvx-deploy",
            )
        return msgspec.convert(raw, Manifest)


def _is_int(size: int | str) -> TypeGuard[int]:
    return isinstance(size, int)


def leads_outside(relative: str) -> bool:
    """Whether a path from a manifest, read as it is written, is none of a file inside a folder."""
    pure = PurePosixPath(relative)
    return pure.is_absolute() or ".." in pure.parts or not pure.parts or "\0" in relative


def _contained(root: Path, relative: str, where: str, *, resolve: bool = True) -> Path:
    outside = leads_outside(relative)
    path = root / relative
    if not outside and resolve:
        # Unlike Path.resolve, which raises on a loop of links.
        outside = not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root))
    if outside:
        raise BundleError(f"{where} names {relative!r}, which lies outside", fix="do not use this bundle; export again")
    return path


def _check_size(path: Path, size: int, fix: str) -> None:
    if not path.is_file():
        raise BundleError(f"{path} is missing", fix=fix)
    if not os.access(path, os.R_OK):
        raise BundleError(f"{path} cannot be read", fix="check the file's permissions")
    found = path.stat().st_size
    if found != size:
        raise BundleError(f"{path} has {found:,} bytes instead of {size:,}", fix=fix)
