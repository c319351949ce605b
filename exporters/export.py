"""A checkpoint in, a bundle out."""

import importlib.metadata
import json
from collections.abc import Collection, Hashable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
import onnx_ir as ir

from cvx_deploy import __version__
from cvx_deploy.bundle.opened import MANIFEST, Bundle, may_replace
from cvx_deploy.bundle.schema import SCHEMA_VERSION, Defaults, Manifest, Network, ShapeEntry, StoredFile, WeightFile
from cvx_deploy.errors import CheckpointError, ShapeError
from cvx_deploy.exporters.cogvideox.tokenizer import disagreement, write_tokenizer_json
from cvx_deploy.exporters.cogvideox.transformer import TransformerContract
from cvx_deploy.exporters.networks import check_longer, contracts_for
from cvx_deploy.exporters.quantization.quantized import QuantizedComponent, Quantizing, quantize_components
from cvx_deploy.exporters.sources.checkpoint import Checkpoint
from cvx_deploy.exporters.sources.fit import check_fit
from cvx_deploy.exporters.sources.lora import merge_adapters, read_adapters
from cvx_deploy.exporters.tracing.contract import NetworkContract
from cvx_deploy.exporters.tracing.trace import onnx_from_contract, weight_location
from cvx_deploy.families.cogvideox.models import model_with_traits
from cvx_deploy.families.cogvideox.vae import Vae
from cvx_deploy.families.registry import MODELS
from cvx_deploy.files import place_file, sha256_of, staged_directory
from cvx_deploy.pipeline.schedulers import SchedulerConfig
from cvx_deploy.progress import Progress, SilentProgress
from cvx_deploy.quantize.recipe import COMPONENTS, Recipe
from cvx_deploy.shape import Shape

_TOOLS = ("torch", "diffusers", "transformers", "onnx-ir", "onnxscript", "optimum")
_TOKENIZER = "tokenizer.json"


@dataclass(frozen=True)
class ExportRequest:
    """What to export.

    Attributes:
        model: A published model's name, which the checkpoint must then be, or any other name.
        checkpoint: A folder in diffusers layout.
        frames: Video frames; None for the model's default, likewise `height` and `width` in pixels.
        shapes: Several sizes in one bundle, the default first, in place of those three.
        precision: What each network computes in, whatever the checkpoint stores, and how it is quantized; see
            `cvx_deploy.quantize.recipe`.
        copy_weights: Whether to put the weight files into the bundle rather than point at the checkpoint.
        transformer: The folder of a fine-tuned transformer in place of the checkpoint's.
        loras: Adapters to be merged into the transformer, file or folder, and the scale of each, in this order.
        variant: Which weight files to read where the checkpoint has several, such as fp16.
        source: Where `checkpoint` was fetched from, such as a hub id; None for a folder of the user's own.
        revision: The commit that was fetched.
        quantizing: How, where the precision asks for it.
        riflex: Whether positions are changed in the shapes that are longer than the model can tell apart; see
            `cogvideox.riflex`.
        rewrites: Which of `cvx_deploy.graph.rewrites.REWRITES` to apply to every graph; None for all.
    """

    model: str
    checkpoint: Path
    frames: int | None = None
    height: int | None = None
    width: int | None = None
    precision: str = "fp32"
    copy_weights: bool = False
    shapes: tuple[Shape, ...] = ()
    transformer: Path | None = None
    loras: tuple[tuple[Path, float], ...] = ()
    variant: str | None = None
    source: str | None = None
    revision: str | None = None
    quantizing: Quantizing = field(default_factory=Quantizing)
    riflex: bool = False
    rewrites: Collection[str] | None = None

    def __post_init__(self) -> None:
        if self.shapes and any(size is not None for size in (self.frames, self.height, self.width)):
            raise ShapeError("both shapes and the sizes of one are given", fix="name every video size as a shape")


def bundle_from_checkpoint(request: ExportRequest, output: Path, progress: Progress | None = None) -> Bundle:
    """Export every network of a checkpoint into a bundle at `output`, replacing an earlier bundle there when whole.

    Raises:
        CheckpointError, WrongModelError, ShapeError, OutputError: As each says.
    """
    progress = progress or SilentProgress()
    checkpoint = Checkpoint(request.checkpoint, request.variant, request.transformer)
    shapes = check_request(request, checkpoint)
    recipe = recipe_of(request, checkpoint)
    request.quantizing.check(recipe)
    SchedulerConfig.from_config(checkpoint.configs["scheduler"])  # a run would refuse it, after all the work here
    contracts, entries = named_contracts(
        {shape: contracts_for(checkpoint, shape, recipe, riflex=request.riflex) for shape in shapes}
    )
    _check_components(checkpoint, contracts)
    for note in checkpoint.notes:
        progress.note(note)
    adapters = read_adapters(request.loras, checkpoint.tensors("transformer"), progress)
    with staged_directory(output, replace=may_replace(output)) as staging:
        _write_tokenizer(checkpoint, staging / _TOKENIZER, progress)
        if adapters:
            checkpoint = merge_adapters(adapters, checkpoint, recipe.transformer.compute, staging, progress)
        quantized = quantize_components(request.quantizing, recipe, checkpoint, shapes, staging, progress)
        for component, each in quantized.items():
            checkpoint = checkpoint.with_made(component, each.made)
        networks = {}
        for name, contract in contracts.items():
            with progress.task(f"trace {name}"):
                of_it = quantized.get(contract.component) if contract.name in COMPONENTS else None
                networks[name] = _write_network(contract, checkpoint, staging / f"{name}.onnx", request.rewrites, of_it)
        weights = _weight_table(checkpoint, networks, progress)
        if request.copy_weights:
            weights = _copy_weights(checkpoint, weights, staging, progress)
        loras = tuple(adapter.entry for adapter in adapters)
        manifest = replace(_manifest(request, recipe, checkpoint, entries, networks, weights, staging), loras=loras)
        (staging / MANIFEST).write_bytes(manifest.to_json())
    return Bundle.open(output)


def _write_tokenizer(checkpoint: Checkpoint, path: Path, progress: Progress) -> None:
    """Write the tokenizer, and refuse one with tokens that the text encoder has no row for."""
    folder, rows = checkpoint.root / "tokenizer", checkpoint.configs["text_encoder"]["vocab_size"]
    tokens = write_tokenizer_json(folder, path)
    if tokens > rows:
        raise CheckpointError(
            f"{folder} has {tokens} tokens, and vocab_size of the text encoder is {rows}, which must be no less",
            fix="take all components from one CogVideoX checkpoint",
        )
    if note := disagreement(folder):
        progress.note(note)


def recipe_of(request: ExportRequest, checkpoint: Checkpoint) -> Recipe:
    """Return the precision of every network."""
    published = model_with_traits(checkpoint.traits)
    return Recipe.parse(request.precision, "fp16" if published and published.dtype == "float16" else "bf16")


def check_request(request: ExportRequest, checkpoint: Checkpoint) -> tuple[Shape, ...]:
    """Return the shapes asked for, after making sure that the checkpoint is the model asked for and can do them."""
    checkpoint.require_model(request.model)
    check_fit(checkpoint)
    shapes = shapes_of(request, checkpoint)
    if request.riflex:
        check_longer(checkpoint, shapes)
    return shapes


def shapes_of(request: ExportRequest, checkpoint: Checkpoint) -> tuple[Shape, ...]:
    """Return the shapes asked for, each once, after checking that the checkpoint can do them."""
    shapes = tuple(dict.fromkeys(request.shapes)) or (_filled_up(request, checkpoint),)
    for shape in shapes:
        checkpoint.limits.check(shape)
    return shapes


def _filled_up(request: ExportRequest, checkpoint: Checkpoint) -> Shape:
    """Return the one shape asked for, filled up with the model's defaults."""
    transformer = checkpoint.configs["transformer"]
    limits = checkpoint.limits
    default = Shape(int(transformer["sample_frames"]), limits.sample_height, limits.sample_width)
    model = model_with_traits(checkpoint.traits)
    trained = (transformer["sample_height"], transformer["sample_width"])
    if model is not None and trained == (model.sample_height, model.sample_width):
        default = Shape(model.frames, model.height, model.width)
    return Shape(
        default.frames if request.frames is None else request.frames,
        default.height if request.height is None else request.height,
        default.width if request.width is None else request.width,
    )


def named_contracts(
    needed: dict[Shape, list[NetworkContract]],
) -> tuple[dict[str, NetworkContract], tuple[ShapeEntry, ...]]:
    """Return every network to trace, by name, and which of them each shape uses.

    A network that several shapes need is traced once. Its name is its role's, unless the shapes need different ones:
    then each is named after the first shape that needs it, such as ``transformer_25x480x720``.
    """
    first: dict[str, dict[Hashable, Shape]] = {}
    for shape, contracts in needed.items():
        for contract in contracts:
            first.setdefault(contract.name, {}).setdefault(contract.interface, shape)

    def name(contract: NetworkContract) -> str:
        variants = first[contract.name]
        return contract.name if len(variants) == 1 else f"{contract.name}_{variants[contract.interface]}"

    entries = tuple(
        ShapeEntry(shape, {contract.name: name(contract) for contract in contracts})
        for shape, contracts in needed.items()
    )
    return {name(contract): contract for contracts in needed.values() for contract in contracts}, entries


def _check_components(checkpoint: Checkpoint, contracts: dict[str, NetworkContract]) -> None:
    """Read every weight header before any tracing, so that a damaged shard is known at once."""
    for component in {contract.component for contract in contracts.values()}:
        checkpoint.tensors(component)


def _write_network(
    contract: NetworkContract,
    checkpoint: Checkpoint,
    path: Path,
    rewrites: Collection[str] | None,
    quantized: QuantizedComponent | None,
) -> Network:
    where = checkpoint.place(contract.component)
    tensors = checkpoint.tensors(contract.component)
    placement = None if quantized is None else quantized.placement
    model = onnx_from_contract(contract, tensors, where, rewrites, placement)
    model.producer_name, model.producer_version = "cvx-deploy", __version__
    model.graph.name = path.stem
    ir.save(model, path)
    external = (value.const_value for value in model.graph.initializers.values())
    locations = {str(tensor.location) for tensor in external if isinstance(tensor, ir.ExternalTensor)}
    return Network(
        _stored(path),
        contract.input_specs,
        contract.output_specs,
        tuple(sorted(locations)),
        contract.state,
        contract.precision,
        None if quantized is None else quantized.entry,
        contract.riflex if isinstance(contract, TransformerContract) else None,
    )


def _stored(path: Path) -> StoredFile:
    return StoredFile(path.name, path.stat().st_size, sha256_of(path))


def _weight_table(checkpoint: Checkpoint, networks: dict[str, Network], progress: Progress) -> dict[str, WeightFile]:
    used = {name for network in networks.values() for name in network.weights}
    files = {
        weight_location(tensor.file): tensor.file
        for component in ("text_encoder", "transformer", "vae")
        for tensor in checkpoint.tensors(component).values()
    }
    total = sum(checkpoint.place(files[name]).stat().st_size for name in used)
    with progress.task("hash weights", total) as advance:
        return {name: checkpoint.weight_file(files[name], advance) for name in sorted(used)}


def _copy_weights(
    checkpoint: Checkpoint, weights: dict[str, WeightFile], staging: Path, progress: Progress
) -> dict[str, WeightFile]:
    copied = {}
    with progress.task("copy weights", sum(entry.size for entry in weights.values())) as advance:
        for name, entry in weights.items():
            if entry.in_bundle:
                copied[name] = entry
                continue
            place_file(checkpoint.place(entry.path), staging / name, advance)
            mtime = (staging / name).stat().st_mtime_ns
            copied[name] = WeightFile(name, entry.size, entry.sha256, mtime, in_bundle=True)
    return copied


def _manifest(
    request: ExportRequest,
    recipe: Recipe,
    checkpoint: Checkpoint,
    shapes: tuple[ShapeEntry, ...],
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
        shapes=shapes,
        fps=published.fps if published else 8,
        precision=str(recipe),
        text_length=checkpoint.configs["transformer"]["max_text_seq_length"],
        vae=_vae(checkpoint.configs["vae"]),
        scheduler={"kind": "ddim" if "DDIM" in scheduler["_class_name"] else "dpm", "config": scheduler},
        tokenizer=_stored(staging / _TOKENIZER),
        networks=networks,
        checkpoint=str(checkpoint.root),
        transformer=None if checkpoint.transformer is None else str(checkpoint.transformer),
        weights=weights,
        provenance=_provenance(request, checkpoint),
        defaults=_defaults(checkpoint.root / "model_index.json"),
    )


_DEFAULTS_KEY = "_cvx_deploy_defaults"
"""In ``model_index.json``, of which diffusers passes over what begins with an underscore."""


def _defaults(index: Path) -> Defaults:
    """Return what a checkpoint recommends for a run: what the published models do, unless it says otherwise.

    Raises:
        CheckpointError: It says something else than steps and a guidance scale.
    """
    stated = json.loads(index.read_bytes()).get(_DEFAULTS_KEY, {}) if index.is_file() else {}
    try:
        return msgspec.convert(stated, Defaults)
    except msgspec.ValidationError as error:
        raise CheckpointError(f"{index}: {_DEFAULTS_KEY}: {error}", fix=f"mend {_DEFAULTS_KEY} or remove it") from error


def _provenance(request: ExportRequest, checkpoint: Checkpoint) -> dict[str, str]:
    source = request.source or str(checkpoint.root)
    origin = {"source": source, "revision": request.revision, "variant": request.variant}
    tools = {tool: importlib.metadata.version(tool) for tool in _TOOLS}
    return {key: value for key, value in origin.items() if value} | {"cvx-deploy": __version__} | tools


def _vae(config: dict[str, Any]) -> Vae:
    """Read a ``vae/config.json``, whose types `Checkpoint` has made sure of."""
    return Vae(
        scaling_factor=float(config["scaling_factor"]),
        invert_scale_latents=bool(config.get("invert_scale_latents", False)),
        latent_channels=config["latent_channels"],
        spatial=2 ** (len(config["block_out_channels"]) - 1),
        temporal=int(config["temporal_compression_ratio"]),
        # diffusers' defaults: half the trained size, in whole latents
        tile_height=config["sample_height"] // 2,
        tile_width=config["sample_width"] // 2,
    )
