"""A checkpoint in, a bundle out."""

import importlib.metadata
import shutil
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from cvx_deploy import __version__
from cvx_deploy.bundle import (
    MANIFEST,
    SCHEMA_VERSION,
    Bundle,
    Manifest,
    Network,
    Precision,
    StoredFile,
    Vae,
    WeightFile,
)
from cvx_deploy.errors import OutputError
from cvx_deploy.exporters.checkpoint import Checkpoint, sensible_config
from cvx_deploy.exporters.contract import NetworkContract
from cvx_deploy.exporters.text_encoder import TextEncoderContract
from cvx_deploy.exporters.tokenizer import write_tokenizer_json
from cvx_deploy.exporters.trace import onnx_from_contract, weight_location
from cvx_deploy.exporters.transformer import TransformerContract
from cvx_deploy.exporters.vae import VaeContract
from cvx_deploy.files import sha256_of, staged_directory
from cvx_deploy.models import MODELS, Shape, model_with_traits
from cvx_deploy.progress import Progress, SilentProgress
from cvx_deploy.runtime.scheduler import SchedulerConfig

_TOOLS = ("torch", "diffusers", "transformers", "onnx-ir", "onnxscript", "optimum")
_TOKENIZER = "tokenizer.json"
_SUFFIXES = {".json", ".onnx", ".safetensors"}


@dataclass(frozen=True)
class ExportRequest:
    """What to export.

    Attributes:
        model: A published model's name, which the checkpoint must then be, or any other name.
        checkpoint: A folder in diffusers layout.
        frames: Video frames; None for the model's default, likewise `height` and `width` in pixels.
        precision: What the networks compute in, whatever the checkpoint stores.
        copy_weights: Whether to put the weight files into the bundle rather than point at the checkpoint.
    """

    model: str
    checkpoint: Path
    frames: int | None = None
    height: int | None = None
    width: int | None = None
    precision: Precision = "fp32"
    copy_weights: bool = False


def bundle_from_checkpoint(request: ExportRequest, output: Path, progress: Progress | None = None) -> Bundle:
    """Export every network of a checkpoint into a bundle at `output`, replacing an earlier bundle there when whole.

    Raises:
        CheckpointError, WrongModelError, ShapeError, OutputError: As each says.
    """
    progress = progress or SilentProgress()
    checkpoint = Checkpoint(request.checkpoint)
    checkpoint.require_model(request.model)
    shape = shape_of(request, checkpoint)
    SchedulerConfig.from_config(checkpoint.configs["scheduler"])  # a run would refuse it, after all the work here
    contracts = contracts_for(checkpoint, shape, request.precision)
    _check_components(checkpoint, contracts)
    with staged_directory(output, replace=_may_replace(output)) as staging:
        write_tokenizer_json(checkpoint.root / "tokenizer", staging / _TOKENIZER)
        networks = {}
        for contract in contracts:
            with progress.task(f"trace {contract.name}"):
                networks[contract.name] = _write_network(contract, checkpoint, staging)
        weights = _weight_table(checkpoint, networks, progress)
        if request.copy_weights:
            weights = _copy_weights(checkpoint, weights, staging, progress)
        manifest = _manifest(request, checkpoint, shape, networks, weights, staging)
        (staging / MANIFEST).write_bytes(manifest.to_json())
    return Bundle.open(output)


def shape_of(request: ExportRequest, checkpoint: Checkpoint) -> Shape:
    """Return the shape asked for, filled up with the model's defaults, after checking that the checkpoint can do it."""
    transformer = checkpoint.configs["transformer"]
    limits = checkpoint.limits
    default = Shape(int(transformer["sample_frames"]), limits.sample_height, limits.sample_width)
    model = model_with_traits(checkpoint.traits)
    trained = (transformer["sample_height"], transformer["sample_width"])
    if model is not None and trained == (model.sample_height, model.sample_width):
        default = Shape(model.frames, model.height, model.width)
    shape = Shape(
        default.frames if request.frames is None else request.frames,
        default.height if request.height is None else request.height,
        default.width if request.width is None else request.width,
    )
    limits.check(shape)
    return shape


def contracts_for(checkpoint: Checkpoint, shape: Shape, precision: Precision) -> list[NetworkContract]:
    """Return the contracts of every network that a shape needs."""
    transformer, vae = checkpoint.configs["transformer"], checkpoint.configs["vae"]
    temporal = checkpoint.limits.temporal
    spatial = 2 ** (len(vae["block_out_channels"]) - 1)
    contracts: list[NetworkContract] = []
    with sensible_config(checkpoint.root / "text_encoder"):
        text_length = transformer["max_text_seq_length"]
        contracts.append(TextEncoderContract(checkpoint.configs["text_encoder"], precision, text_length))
    with sensible_config(checkpoint.root / "transformer"):
        contracts.append(TransformerContract(transformer, precision, shape, spatial, temporal))
    with sensible_config(checkpoint.root / "vae"):
        contracts += _encoder_contracts(checkpoint, shape, precision)
        frames = -(-shape.frames // temporal)
        contracts += _chunk_contracts(vae, precision, "vae_decoder_first", "vae_decoder_next", frames, 2)
    return contracts


def _encoder_contracts(checkpoint: Checkpoint, shape: Shape, precision: Precision) -> list[NetworkContract]:
    """Return the encoder's chunks: one image for image-to-video, the whole clip for video-to-video."""
    vae, traits = checkpoint.configs["vae"], checkpoint.traits
    frames = 1 if traits.task == "image-to-video" else shape.frames
    latent_frames = -(-frames // checkpoint.limits.temporal)
    if traits.task == "text-to-video" and latent_frames % (traits.patch_size_t or 1):
        return []  # diffusers' video-to-video does not pad, so it cannot do this shape
    return _chunk_contracts(vae, precision, "vae_encoder", "vae_encoder_next", frames, checkpoint.limits.frame_period)


def _chunk_contracts(
    vae: dict[str, object], precision: Precision, first: str, following: str, frames: int, chunk: int
) -> list[NetworkContract]:
    """Return the first chunk, which takes the odd frame, and the steady one if any follows."""
    chunks = max(frames // chunk, 1)
    first_frames = frames - chunk * (chunks - 1)
    contracts: list[NetworkContract] = [VaeContract(vae, precision, first, first_frames, last=chunks == 1)]
    if chunks > 1:
        contracts.append(VaeContract(vae, precision, following, chunk, last=False))
    return contracts


def _check_components(checkpoint: Checkpoint, contracts: list[NetworkContract]) -> None:
    """Read every weight header before any tracing, so that a damaged shard is known at once."""
    for component in {contract.component for contract in contracts}:
        checkpoint.tensors(component)


def _may_replace(output: Path) -> bool:
    """Whether a folder is a bundle, which is replaced as a whole; raise when it holds anything of the user's too."""
    if not (output / MANIFEST).is_file():
        return False
    for entry in output.iterdir():
        if entry.name != "engines" and not (entry.is_file() and entry.suffix in _SUFFIXES):
            raise OutputError(
                f"{output} holds {entry.name}, which is not of a bundle, and would be lost",
                fix="move it away, or choose another --output",
            )
    return True


def _write_network(contract: NetworkContract, checkpoint: Checkpoint, staging: Path) -> Network:
    where = checkpoint.root / contract.component
    model = onnx_from_contract(contract, checkpoint.tensors(contract.component), where)
    model.producer_name, model.producer_version = "cvx-deploy", __version__
    model.graph.name = contract.name
    path = staging / f"{contract.name}.onnx"
    ir.save(model, path)
    external = (value.const_value for value in model.graph.initializers.values())
    locations = {str(tensor.location) for tensor in external if isinstance(tensor, ir.ExternalTensor)}
    return Network(_stored(path), contract.input_specs, contract.output_specs, tuple(sorted(locations)), contract.state)


def _stored(path: Path) -> StoredFile:
    return StoredFile(path.name, path.stat().st_size, sha256_of(path))


def _weight_table(checkpoint: Checkpoint, networks: dict[str, Network], progress: Progress) -> dict[str, WeightFile]:
    used = {name for network in networks.values() for name in network.weights}
    files = {
        weight_location(tensor.file): tensor.file
        for component in ("text_encoder", "transformer", "vae")
        for tensor in checkpoint.tensors(component).values()
    }
    total = sum((checkpoint.root / files[name]).stat().st_size for name in used)
    with progress.task("hash weights", total) as advance:
        return {name: checkpoint.weight_file(files[name], advance) for name in sorted(used)}


def _copy_weights(
    checkpoint: Checkpoint, weights: dict[str, WeightFile], staging: Path, progress: Progress
) -> dict[str, WeightFile]:
    copied = {}
    with progress.task("copy weights", sum(entry.size for entry in weights.values())) as advance:
        for name, entry in weights.items():
            shutil.copy2(checkpoint.root / entry.path, staging / name)
            mtime = (staging / name).stat().st_mtime_ns
            copied[name] = WeightFile(name, entry.size, entry.sha256, mtime, in_bundle=True)
            advance(entry.size)
    return copied


def _manifest(
    request: ExportRequest,
    checkpoint: Checkpoint,
    shape: Shape,
    networks: dict[str, Network],
    weights: dict[str, WeightFile],
    staging: Path,
) -> Manifest:
    published = MODELS.get(request.model) or model_with_traits(checkpoint.traits)
    scheduler = checkpoint.configs["scheduler"]
    return Manifest(
        schema_version=SCHEMA_VERSION,
        model=request.model,
        traits=checkpoint.traits,
        shape=shape,
        fps=published.fps if published else 8,
        precision=request.precision,
        text_length=checkpoint.configs["transformer"]["max_text_seq_length"],
        vae=_vae(checkpoint.configs["vae"]),
        scheduler={"kind": "ddim" if "DDIM" in scheduler["_class_name"] else "dpm", "config": scheduler},
        tokenizer=_stored(staging / _TOKENIZER),
        networks=networks,
        checkpoint=str(checkpoint.root),
        weights=weights,
        provenance={"cvx-deploy": __version__} | {tool: importlib.metadata.version(tool) for tool in _TOOLS},
    )


def _vae(config: dict[str, object]) -> Vae:
    channels = config["block_out_channels"]
    assert isinstance(channels, list)
    spatial = 2 ** (len(channels) - 1)
    return Vae(
        scaling_factor=float(str(config["scaling_factor"])),
        invert_scale_latents=bool(config.get("invert_scale_latents", False)),
        latent_channels=int(str(config["latent_channels"])),
        spatial=spatial,
        temporal=int(float(str(config["temporal_compression_ratio"]))),
        # diffusers' defaults: half the trained size, in whole latents
        tile_height=int(str(config["sample_height"])) // 2,
        tile_width=int(str(config["sample_width"])) // 2,
    )
