"""The command that finds out how a model can be quantized: its activations' ranges, and what it is sensitive to."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cvx_deploy.bounds import MOST_STEPS
from cvx_deploy.cli.checkpoints import fetched
from cvx_deploy.cli.group import cli
from cvx_deploy.cli.options import (
    ENGINES_DIR,
    IMAGE,
    NUM_PROMPTS,
    OFFLINE,
    REVISION,
    SEED,
    SOURCE,
    VARIANT,
    Result,
    need_export_extra,
    plain_name,
    reporting,
    shape_of,
)
from cvx_deploy.families.registry import MODELS
from cvx_deploy.progress import Progress
from cvx_deploy.shape import Shape

if TYPE_CHECKING:
    from cvx_deploy.exporters.quantization.calibrate import CalibrationRequest


@dataclass(frozen=True)
class _Ranking:
    """What of the options is for ``--sensitivity``."""

    precision: str
    calibration: Path | None
    by: str
    min_psnr: float | None


@cli.command()
@click.option("--model", metavar="NAME", callback=plain_name, help=f"{', '.join(MODELS)}, or a name of your own.")
@SOURCE
@REVISION
@VARIANT
@OFFLINE
@click.option("--shape", type=shape_of, metavar="FxHxW", help="The video size. Default: the model's.")
@click.option(
    "--prompts",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="A text file with one prompt per line. Default: 64 that come with the package.",
)
@NUM_PROMPTS
@click.option(
    "--steps",
    type=click.IntRange(max=MOST_STEPS),
    default=10,
    show_default=True,
    help="Of the sampler; three of them are observed.",
)
@click.option("--guidance-scale", type=float, default=6.0, show_default=True, help="1: no unconditional branch.")
@click.option("--seed", type=SEED, default=0, show_default=True, help="Of the first prompt's noise.")
@IMAGE
@click.option("--compute", type=click.Choice(["fp32", "fp16", "bf16"]), help="Default: the checkpoint's own type.")
@click.option(
    "--second-moments",
    is_flag=True,
    help="Observe what better rounding to int4wo takes, too; a 5b's table has 0.95 GB then, instead of 20 MB.",
)
@click.option(
    "--sensitivity", is_flag=True, help="Rank what suffers most from quantization, instead of writing a table."
)
@click.option("--precision", default="int8", show_default=True, help="With --sensitivity: the scheme to judge.")
@click.option("--calibration", type=click.Path(path_type=Path), metavar="FILE", help="With --sensitivity: the table.")
@click.option("--by", type=click.Choice(["block", "layer"]), default="block", show_default=True, help="What to rank.")
@click.option("--min-psnr", type=float, metavar="DB", help="With --sensitivity: exclude places until this is reached.")
@click.option(
    "--show",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Print a table; given twice, compare two.",
)
@click.option("--output", type=click.Path(path_type=Path), metavar="FILE", help="Default: in the engines folder.")
@ENGINES_DIR
@reporting
def quantize(
    model: str | None,
    show: tuple[Path, ...],
    sensitivity: bool,
    precision: str,
    calibration: Path | None,
    by: str,
    min_psnr: float | None,
    output: Path | None,
    engines_dir: Path,
    progress: Progress,
    **options: Any,
) -> Result:
    """Observe a model's activations, for export --precision int8 or fp8, and int4wo at its best.

    diffusers' own sampler runs over the prompts, streamed from the checkpoint block by block, so that the 5B takes a
    few GB. Stopped, it goes on after the last whole prompt. With --sensitivity it ranks the transformer's blocks or
    layers by what quantizing each alone does to the output, and writes a list that export --exclude takes, and a plot.

    \b
    Examples:
      cvx-deploy quantize --model 5b
      cvx-deploy quantize --model 5b --shape 9x240x360 --num-prompts 8
      cvx-deploy quantize --model 5b --second-moments
      cvx-deploy quantize --model 5b --sensitivity --calibration 5b.safetensors --min-psnr 30
      cvx-deploy quantize --show engines/5b.calibration.safetensors
    """
    need_export_extra()
    if show:
        return _shown(show)
    if model is None:
        raise click.UsageError("name a model with --model NAME")
    if not sensitivity and (calibration or min_psnr is not None):
        raise click.UsageError("--calibration and --min-psnr need --sensitivity")
    request = _request(model, progress, **options)
    kind = "sensitivity.json" if sensitivity else "calibration.safetensors"
    place = output or engines_dir / f"{model}.{kind}"
    if sensitivity:
        return _ranked(request, _Ranking(precision, calibration, by, min_psnr), place, progress)
    return _calibrated(request, place, progress)


def _request(
    model: str,
    progress: Progress,
    *,
    checkpoint: str | None,
    revision: str | None,
    variant: str | None,
    offline: bool,
    shape: Shape | None,
    prompts: Path | None,
    num_prompts: int | None,
    **options: Any,
) -> "CalibrationRequest":
    from cvx_deploy.exporters.export import ExportRequest, check_request
    from cvx_deploy.exporters.quantization.calibrate import CalibrationRequest
    from cvx_deploy.exporters.sources.checkpoint import Checkpoint
    from cvx_deploy.quantize.prompts import SHIPPED, read_prompts

    words = read_prompts(prompts or SHIPPED, num_prompts)
    shapes = () if shape is None else (shape,)
    wanted = ExportRequest(model, Path(), shapes=shapes, revision=revision, variant=variant)
    request = fetched(wanted, checkpoint, offline, progress)
    found = Checkpoint(request.checkpoint, variant)
    (size,) = check_request(request, found)
    return CalibrationRequest(found, size, words, **options)


def _calibrated(request: "CalibrationRequest", place: Path, progress: Progress) -> Result:
    from cvx_deploy.exporters.quantization.calibrate import calibrate
    from cvx_deploy.quantize.table import describe

    table = calibrate(request, place, progress)
    values = {"table": str(place), "bytes": place.stat().st_size, **table.as_dict()}
    return values, f"{place}\n{describe(table)}"


def _ranked(request: "CalibrationRequest", ranking: _Ranking, place: Path, progress: Progress) -> Result:
    import json

    from cvx_deploy.exporters.quantization.sensitivity import check_scheme, draw, sensitivity
    from cvx_deploy.files import staged_file
    from cvx_deploy.quantize.table import CalibrationTable

    precision = check_scheme(ranking.precision, request)
    table = None if ranking.calibration is None else CalibrationTable.read(ranking.calibration)
    report = sensitivity(request, precision, table, progress, by=ranking.by, min_psnr=ranking.min_psnr)
    with staged_file(place) as temporary:
        temporary.write_text(json.dumps(report.as_dict(), indent=2) + "\n")
    plot = draw(report, place.with_suffix(".svg"))
    lines = [f"{one.place}: {one.relative_l2:.2e} of the output, {one.psnr:.1f} dB" for one in report.ranking[:10]]
    excluded = ", ".join(report.exclude) or "nothing"
    lines.append(f"all quantized: {report.psnr_of_all:.1f} dB; without {excluded}: {report.psnr:.1f} dB")
    return {"report": str(place), "plot": str(plot), **report.as_dict()}, "\n".join([str(place), str(plot), *lines])


def _shown(files: tuple[Path, ...]) -> Result:
    from cvx_deploy.quantize.table import CalibrationTable, describe, describe_difference

    tables = [CalibrationTable.read(file) for file in files]
    if len(tables) > 2:
        raise click.UsageError("--show takes one table, or two to compare")
    if len(tables) == 1:
        return {"table": str(files[0]), **tables[0].as_dict()}, describe(tables[0])
    values, text = describe_difference(*tables)
    return {"tables": [str(file) for file in files], **values}, text
