"""The manifest of a bundle, ``bundle.json``: what it says, read strictly and written."""

import math
import re
from dataclasses import asdict, dataclass
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal, TypedDict, TypeGuard

import msgspec
import numpy as np

from cvx_deploy.bounds import MOST_LATENTS, MOST_VALUES, Factor, Positive, Size, check_video
from cvx_deploy.bundle.step_table import StepTable
from cvx_deploy.errors import BundleError
from cvx_deploy.families.cogvideox.models import SchedulerKind, Traits
from cvx_deploy.families.cogvideox.vae import Vae
from cvx_deploy.precision import Precision, SchemeName
from cvx_deploy.reading import reading
from cvx_deploy.shape import Shape

SCHEMA_VERSION = 5
READABLE_VERSIONS = (4, 5)
AGAIN = "export the bundle again; run: cvx-deploy export --help"


DType = Literal["float32", "float16", "bfloat16", "int64"]


def numpy_dtype(name: DType) -> "np.dtype[Any]":
    """Return NumPy's type of that name; it has no bfloat16 of its own, and ml_dtypes lends it one."""
    if name == "bfloat16":
        import ml_dtypes

        lent: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
        return lent
    return np.dtype(name)


_SYMBOL = re.compile(r"([1-9]\d{0,4}\*)?[a-z_]{1,40}")
_MOST_AXES = 8


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of a network.

    Attributes:
        name: Its name in the ONNX graph.
        dtype: Its element type at the network's boundary; bfloat16 only of what runs hand on, and the host never reads.
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
        raise BundleError(f"the manifest gives an axis the size {symbol}, which means nothing there", fix=AGAIN)
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
        calibration: The absolute path of the table that scales or rounding were made with, and its SHA-256; None for
            none.
    """

    scheme: SchemeName
    layers: Positive
    excluded: tuple[str, ...] = ()
    attention: bool = False
    calibration: tuple[str, str] | None = None


@dataclass(frozen=True)
class Riflex:
    """The temporal frequency of rotary positions that was lowered for a longer video (RIFLEx, arXiv:2502.15894).

    Attributes:
        component: Which, from 1, as the paper counts.
        tokens: Along time, of the video: its new period is tokens / 0.9.
    """

    component: Positive
    tokens: Positive


@dataclass(frozen=True)
class Network:
    """One ONNX graph and its interface.

    Attributes:
        state: Input name to output name, for tensors that one run hands to the next (the VAE's causal caches).
        precision: What it computes in, but for what `quantization` says.
        riflex: Of a transformer, which of its positions were changed for a longer video; None where none were.
    """

    file: StoredFile
    inputs: Annotated[tuple[TensorSpec, ...], msgspec.Meta(min_length=1)]
    outputs: Annotated[tuple[TensorSpec, ...], msgspec.Meta(min_length=1)]
    weights: tuple[str, ...]
    state: dict[str, str]
    precision: Precision
    quantization: Quantization | None = None
    riflex: Riflex | None = None

    def __post_init__(self) -> None:
        if not {spec.name for spec in self.outputs}.issuperset(self.state.values()):
            raise ValueError("its state names what is not among its outputs")


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


@dataclass(frozen=True)
class Defaults:
    """What a run takes where nothing else is asked for: what the model's authors, or those who trained it, recommend.

    Attributes:
        steps: Denoising steps.
        guidance_scale: Weight of the prompt against the negative prompt.
    """

    steps: Annotated[int, msgspec.Meta(gt=0, le=1000)] = 50
    guidance_scale: Annotated[float, msgspec.Meta(ge=0, le=1000)] = 6.0


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
        family: The model family it is of.
        defaults: What a run takes where nothing else is asked for. Manifests before version 5 do not say, and mean 50
            steps at guidance 6.
        step_tables: What ``cvx-deploy calibrate-cache`` found; manifests without it have none.
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
    family: Literal["cogvideox"] = "cogvideox"
    defaults: Defaults = Defaults()
    step_tables: tuple[StepTable, ...] = ()

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


def manifest_from_json(text: bytes, file: str) -> Manifest:
    """Read the text of a ``bundle.json``, which lies at `file`, strictly; see `Manifest.to_json`.

    Raises:
        BundleError: It is damaged, or of another schema version.
    """
    with reading(file, BundleError, fix=AGAIN):
        raw = msgspec.json.decode(text)
        version = raw.get("schema_version") if isinstance(raw, dict) else None
        if version not in READABLE_VERSIONS:
            raise BundleError(
                f"{file} has schema version {version}, this program reads {' and '.join(map(str, READABLE_VERSIONS))}",
                fix="export the bundle again with this version of cvx-deploy",
            )
        return msgspec.convert(raw, Manifest)


def _is_int(size: int | str) -> TypeGuard[int]:
    return isinstance(size, int)


def leads_outside(relative: str) -> bool:
    """Whether a path from a manifest, read as it is written, is none of a file inside a folder."""
    pure = PurePosixPath(relative)
    return pure.is_absolute() or ".." in pure.parts or not pure.parts or "\0" in relative
