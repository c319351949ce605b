"""Commands that make, convert and export checkpoints."""

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cvx_deploy.cli.group import cli
from cvx_deploy.cli.options import (
    ENGINES_DIR,
    LORAS,
    OFFLINE,
    REVISION,
    SEED,
    SOURCE,
    VARIANT,
    Result,
    need_export_extra,
    plain_name,
    precision_text,
    reporting,
    sizes,
)
from cvx_deploy.families.registry import MODELS
from cvx_deploy.miniatures import MINIATURES, miniature
from cvx_deploy.progress import Progress
from cvx_deploy.shape import Shape

if TYPE_CHECKING:
    from cvx_deploy.exporters.export import ExportRequest


@cli.command()
@click.option("--like", required=True, type=click.Choice(list(MODELS)), help="The model to imitate.")
@click.option(
    "--scale",
    type=click.Choice(["tiny", "wide", "full"]),
    default="tiny",
    show_default=True,
    help="A few MB; the real width in 2 blocks, about 2 GB; or the real size.",
)
@click.option("--output", required=True, type=click.Path(path_type=Path), metavar="DIR", help="A folder that is new.")
@click.option("--seed", type=SEED, default=0, show_default=True, help="Of the random weights.")
@click.option("--outliers", is_flag=True, help="Plant outliers as trained models have them, for quantization to meet.")
@reporting
def synth(like: str, scale: str, output: Path, seed: int, outliers: bool, progress: Progress) -> Result:
    """Write a checkpoint with random weights, in the layout of the published ones.

    \b
    Examples:
      cvx-deploy synth --like 5b --scale full --output checkpoints/5b-random
      cvx-deploy synth --like 5b --scale wide --outliers --output checkpoints/5b-wide
    """
    need_export_extra()
    from cvx_deploy.exporters.sources.synth import synthesize

    synthesize(like, scale, output, seed=seed, outliers=outliers, progress=progress)  # type: ignore[arg-type]
    size = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
    told = {"checkpoint": str(output), "like": like, "scale": scale, "seed": seed, "outliers": outliers, "bytes": size}
    return told, str(output)


@cli.command()
@click.option(
    "--model",
    required=True,
    metavar="NAME",
    callback=plain_name,
    help=f"{', '.join(MODELS)}, or a name of your own.",
)
@SOURCE
@REVISION
@VARIANT
@OFFLINE
@sizes("A video size, such as 49x480x720; again for more in the bundle.", "the model's", several=True)
@click.option(
    "--precision",
    metavar="PRECISION",
    callback=lambda *given: None if given[-1] is None else precision_text(*given),
    help="fp32, fp16, bf16 (not for ONNX Runtime on a CPU), or quantized: int8, int8wo, int4wo, fp8. See below. "
    "Default: fp32.",
)
@click.option(
    "--for",
    "target",
    metavar="TARGET",
    help="Choose the precision for a machine, and say why: cpu for this one's, or a GPU such as rtx4090 or h100.",
)
@click.option(
    "--calibration",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="For int8 and fp8, and int4wo at its best: the table that cvx-deploy quantize wrote.",
)
@click.option("--calibration-any-shape", is_flag=True, help="Take a table that was made at another video size.")
@click.option(
    "--exclude",
    multiple=True,
    metavar="PLACE|FILE|none",
    help="Layers not to quantize: one, a module of some, or a file of quantize --sensitivity; again for more. Default: "
    "for int8 and fp8 the last of every 16 blocks, the most sensitive ones.",
)
@click.option("--quantize-attention", is_flag=True, help="Let attention multiply in fp8 too. TensorRT only.")
@click.option(
    "--transformer",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="A fine-tuned transformer in place of the checkpoint's.",
)
@LORAS
@click.option(
    "--riflex",
    is_flag=True,
    help="For sizes longer than the model was trained on: lower one frequency of its positions (arXiv:2502.15894).",
)
@click.option("--copy-weights", is_flag=True, help="Put the weights into the bundle instead of pointing at them.")
@click.option("--output", type=click.Path(path_type=Path), metavar="DIR", help="Default: NAME in the engines folder.")
@ENGINES_DIR
@reporting
def export(
    model: str,
    checkpoint: str | None,
    offline: bool,
    shape: tuple[Shape, ...],
    output: Path | None,
    engines_dir: Path,
    precision: str | None,
    target: str | None,
    calibration: Path | None,
    calibration_any_shape: bool,
    exclude: tuple[str, ...],
    quantize_attention: bool,
    progress: Progress,
    **options: Any,
) -> Result:
    """Trace a checkpoint's networks into ONNX and write a bundle.

    The weights stay where they are, unless --copy-weights: the bundle points at them and knows their hashes. Of a hub's
    repository, only the files needed are fetched, into the cache that all programs share.

    A quantized precision keeps the transformer's linear layers in 8 or 4 bits: int8 and fp8 multiply in 8 bits and need
    --calibration, int8wo and int4wo shrink the weights only. The text encoder goes with it, weights only; what the rest
    computes in stands after a slash. Each network can have its own: transformer=fp8,text_encoder=int8wo,vae=fp16.

    \b
    Examples:
      cvx-deploy export --model 5b
      cvx-deploy export --model 5b --checkpoint checkpoints/CogVideoX-5b --frames 25
      cvx-deploy export --model 5b --shape 49x480x720 --shape 25x480x720 --lora style.safetensors:0.8
      cvx-deploy export --model 5b --for rtx4090
      cvx-deploy export --model 5b --precision int8wo
      cvx-deploy export --model 5b --precision int8/fp32 --calibration 5b.calibration.safetensors
    """
    need_export_extra()
    from dataclasses import asdict

    from cvx_deploy.estimate.target import precision_for
    from cvx_deploy.exporters.export import ExportRequest, bundle_from_checkpoint
    from cvx_deploy.exporters.quantization.quantized import Quantizing
    from cvx_deploy.quantize.layers import excluded_places

    if target is not None:
        if precision is not None:
            raise click.UsageError("give --precision or --for")
        largest = max(shape, key=lambda size: size.frames * size.height * size.width, default=None)
        chosen = precision_for(target, MODELS.get(model), largest, calibrated=calibration is not None)
        progress.note(f"for {target}: {chosen}")
        precision = chosen.precision
    options["precision"] = precision or "fp32"
    quantizing = Quantizing(calibration, calibration_any_shape, excluded_places(exclude), quantize_attention)
    request = ExportRequest(model=model, checkpoint=Path(), shapes=shape, quantizing=quantizing, **options)
    request = fetched(request, checkpoint, offline, progress)
    bundle = bundle_from_checkpoint(request, output or engines_dir / model, progress)
    networks = {name: network.file.size for name, network in bundle.manifest.networks.items()}
    manifest = bundle.manifest
    values = {
        "bundle": str(bundle.path),
        "model": model,
        "shapes": [str(shape) for shape in bundle.shapes],
        "precision": manifest.precision,
        "loras": [asdict(lora) for lora in manifest.loras],
        "networks": networks,
        "quantized": {
            name: asdict(network.quantization)
            for name, network in manifest.networks.items()
            if network.quantization is not None
        },
    }
    return values, str(bundle.path)


def fetched(request: "ExportRequest", checkpoint: str | None, offline: bool, progress: Progress) -> "ExportRequest":
    """Return a request with its checkpoint where it lies here, fetched if it has to be.

    Args:
        request: Its model, revision and variant say what to fetch.
        checkpoint: A folder or a hub's id; None for the model's own.
        offline: Whether to do without the network.
        progress: Shows the fetching.
    """
    from dataclasses import replace

    from cvx_deploy.exporters.export import check_request
    from cvx_deploy.exporters.sources.hub import Source, fetch

    if checkpoint is None and request.model in MINIATURES:
        checkpoint = str(miniature(request.model))
    if checkpoint is None and request.model not in MODELS:
        raise click.UsageError(f"{request.model} is a name of your own: name its checkpoint with --checkpoint")
    where = checkpoint or MODELS[request.model].hub_id
    own = request.transformer is not None
    source = Source(where, request.revision, request.variant, offline, own_transformer=own)
    request = replace(request, checkpoint=Path(where))
    found = fetch(source, functools.partial(check_request, request), progress)
    return replace(request, checkpoint=found.folder, source=found.source, revision=found.revision)


@cli.command()
@click.option("--transformer", type=click.Path(path_type=Path), metavar="FILE.pt", help="SAT's transformer.")
@click.option("--vae", type=click.Path(path_type=Path), metavar="FILE.pt", help="SAT's VAE.")
@click.option(
    "--checkpoint",
    required=True,
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="One of the same model in diffusers layout, for the configs and all else.",
)
@click.option("--output", required=True, type=click.Path(path_type=Path), metavar="DIR", help="A folder that is new.")
@reporting
def convert(transformer: Path | None, vae: Path | None, checkpoint: Path, output: Path, progress: Progress) -> Result:
    """Make a checkpoint in diffusers layout from the original CogVideo repository's SAT files.

    \b
    Example:
      cvx-deploy convert --transformer sat.pt --checkpoint CogVideoX-5b --output my-5b
    """
    if transformer is None and vae is None:
        raise click.UsageError("name a file with --transformer or --vae")
    need_export_extra()
    from cvx_deploy.exporters.sources.sat import checkpoint_from_sat

    checkpoint_from_sat(transformer, vae, checkpoint, output, progress)
    size = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
    return {"checkpoint": str(output), "bytes": size}, str(output)
