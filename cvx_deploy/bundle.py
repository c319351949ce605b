"""The bundle: one folder that holds everything the runtime needs, described by its manifest ``bundle.json``.

Every path in a bundle stays inside it, but for one kind: the manifest's weight table may say that a weight file lies in
the checkpoint it was exported from. ONNX files name their weights by that table's plain names.
"""

import os
import re
import shlex
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, TypedDict

import msgspec

from cvx_deploy.errors import BundleError
from cvx_deploy.files import sha256_of
from cvx_deploy.models import SchedulerKind, Shape, Traits
from cvx_deploy.progress import Progress

MANIFEST = "bundle.json"
SCHEMA_VERSION = 1

Precision = Literal["fp32", "fp16", "bf16"]
DType = Literal["float32", "float16", "int64"]
Positive = Annotated[int, msgspec.Meta(gt=0)]
_AGAIN = "export the bundle again; run: cvx-deploy export --help"
_SYMBOL = re.compile(r"([1-9]\d*\*)?[a-z_]+")


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
    size: int
    sha256: str


@dataclass(frozen=True)
class WeightFile:
    """A safetensors file that ONNX graphs point into.

    Attributes:
        path: Relative to the bundle when `in_bundle`, else to the checkpoint.
        mtime_ns: When a file outside still has this time and size, it is taken to be the one that was hashed.
    """

    path: str
    size: int
    sha256: str
    mtime_ns: int
    in_bundle: bool


@dataclass(frozen=True)
class Network:
    """One ONNX graph and its interface.

    Attributes:
        state: Input name to output name, for tensors that one run hands to the next (the VAE's causal caches).
    """

    file: StoredFile
    inputs: Annotated[tuple[TensorSpec, ...], msgspec.Meta(min_length=1)]
    outputs: Annotated[tuple[TensorSpec, ...], msgspec.Meta(min_length=1)]
    weights: tuple[str, ...]
    state: dict[str, str]

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

    scaling_factor: Annotated[float, msgspec.Meta(gt=0)]
    invert_scale_latents: bool
    latent_channels: Positive
    spatial: Positive
    temporal: Positive
    tile_height: Positive
    tile_width: Positive


class SchedulerEntry(TypedDict):
    """The sampler the checkpoint recommends, and diffusers' ``scheduler_config.json``."""

    kind: SchedulerKind
    config: dict[str, Any]


@dataclass(frozen=True)
class Manifest:
    """Everything ``bundle.json`` says.

    Attributes:
        model: The published model this is, or the name it was exported under.
        fps: Frames a second of the finished video.
        checkpoint: The absolute folder the weights outside the bundle lie in.
        weights: Plain name, as ONNX files use it, to file.
        provenance: Hub id or folder, and the versions of the tools that made the bundle.
    """

    schema_version: int
    model: str
    traits: Traits
    shape: Shape
    fps: Positive
    precision: Precision
    text_length: Positive
    vae: Vae
    scheduler: SchedulerEntry
    tokenizer: StoredFile
    networks: dict[str, Network]
    checkpoint: str
    weights: dict[str, WeightFile]
    provenance: dict[str, str]

    def __post_init__(self) -> None:
        if min(self.shape.frames, self.shape.height, self.shape.width) < 1:
            raise ValueError(f"its shape is {self.shape}")

    def to_json(self) -> bytes:
        """Return the text of ``bundle.json``."""
        return msgspec.json.format(msgspec.json.encode(asdict(self)), indent=2) + b"\n"


@dataclass(frozen=True)
class Bundle:
    """An opened bundle: its folder and its manifest, whose small files have been checked."""

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: Path) -> "Bundle":
        """Read and check a bundle.

        Every file inside the bundle must be there, stay inside it, and have its size and hash. Weight files are
        checked by `weight_path`, when a network that needs them is loaded.

        Raises:
            BundleError: Which file is missing, truncated, altered or foreign, and how to mend it.
        """
        manifest = _read_manifest(path)
        bundle = cls(path, manifest)
        for stored in (manifest.tokenizer, *(network.file for network in manifest.networks.values())):
            _check_hash(bundle.inside(stored.path), stored, bundle.remedy)
        return bundle

    @property
    def remedy(self) -> str:
        """How to make this bundle anew."""
        manifest, shape = self.manifest, self.manifest.shape
        options = {
            "model": manifest.model,
            "checkpoint": manifest.checkpoint,
            "frames": shape.frames,
            "height": shape.height,
            "width": shape.width,
            "precision": manifest.precision,
            "output": self.path,
        }
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        copied = ["--copy-weights"] if any(entry.in_bundle for entry in manifest.weights.values()) else []
        return "run: " + shlex.join(["cvx-deploy", "export", *words, *copied])

    def inside(self, relative: str) -> Path:
        """Return the absolute path of a file of the bundle, refusing one that leaves it."""
        return _contained(self.path, relative, f"the manifest of {self.path}")

    def onnx_path(self, network: str) -> Path:
        """Return where a network's ONNX file lies."""
        return self.inside(self.network(network).file.path)

    def network(self, name: str) -> Network:
        """Return a network of the manifest, or say that the bundle has none of that name."""
        if name not in self.manifest.networks:
            have = ", ".join(sorted(self.manifest.networks))
            raise BundleError(f"{self.path} has no network {name} (it has {have})", fix=self.remedy)
        return self.manifest.networks[name]

    def weight_path(self, name: str, progress: Progress) -> Path:
        """Return where a weight file lies, after making sure that it is the one the bundle was made from.

        A file whose time stamp changed since it was hashed is hashed again.
        """
        if name not in self.manifest.weights:
            raise BundleError(f"{self.path}: no weight file named {name} in the manifest", fix=self.remedy)
        entry = self.manifest.weights[name]
        root = self.path if entry.in_bundle else Path(self.manifest.checkpoint)
        path = _contained(root, entry.path, f"the weight table of {self.path}", resolve=entry.in_bundle)
        fix = (
            self.remedy
            if entry.in_bundle
            else f"put the checkpoint back at {root}, or run the command again with --checkpoint DIR"
        )
        _check_size(path, entry.size, fix)
        if path.stat().st_mtime_ns != entry.mtime_ns:
            with progress.task(f"check {path.name}", entry.size) as advance:
                altered = sha256_of(path, advance) != entry.sha256
            if altered:
                raise BundleError(f"{path} was altered since the bundle {self.path} was made", fix=fix)
        return path

    def with_checkpoint(self, checkpoint: Path) -> "Bundle":
        """Return the same bundle with its outside weights taken from another copy of the checkpoint."""
        return Bundle(self.path, replace(self.manifest, checkpoint=str(checkpoint.absolute())))


def _read_manifest(path: Path) -> Manifest:
    file = path / MANIFEST
    if not path.is_dir():
        raise BundleError(f"there is no bundle at {path}", fix="run: cvx-deploy export, or name one with --bundle DIR")
    if not file.is_file():
        raise BundleError(f"{path} is not a bundle: it has no {MANIFEST}", fix="name a bundle with --bundle DIR")
    try:
        raw = msgspec.json.decode(file.read_bytes())
        version = raw.get("schema_version") if isinstance(raw, dict) else None
        if version != SCHEMA_VERSION:
            raise BundleError(
                f"{file} has schema version {version}, this program reads {SCHEMA_VERSION}",
                fix="export the bundle again with this version of cvx-deploy",
            )
        return msgspec.convert(raw, Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BundleError(f"{file} is damaged: {error}", fix=_AGAIN) from error
    except OSError as error:
        raise BundleError(f"cannot read {file}: {error.strerror}", fix="check the file's permissions") from error


def _contained(root: Path, relative: str, where: str, *, resolve: bool = True) -> Path:
    pure = PurePosixPath(relative)
    outside = pure.is_absolute() or ".." in pure.parts or not pure.parts or "\0" in relative
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


def _check_hash(path: Path, stored: StoredFile, fix: str) -> None:
    _check_size(path, stored.size, fix)
    if sha256_of(path) != stored.sha256:
        raise BundleError(f"{path} was altered, or belongs to another bundle (its SHA-256 differs)", fix=fix)
