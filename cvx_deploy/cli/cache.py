"""The command that finds which steps of a model's schedule to run, and how to forecast the others."""

from pathlib import Path
from typing import Any

import click

from cvx_deploy.cli.group import cli
from cvx_deploy.cli.options import (
    IMAGE,
    MOVED_CHECKPOINT,
    NAMED_ENGINE,
    NUM_PROMPTS,
    SEED,
    Result,
    cpu_threads,
    open_bundle,
    reporting,
    sizes,
    which_bundle,
)
from cvx_deploy.engines.spec import EngineName
from cvx_deploy.progress import Progress
from cvx_deploy.shape import Shape


@cli.command("calibrate-cache")
@which_bundle
@click.option(
    "--prompts",
    type=click.Path(path_type=Path),
    required=True,
    metavar="FILE",
    help="A text file with one prompt per line; a video is made of each, with all steps.",
)
@NUM_PROMPTS
@IMAGE
@click.option("--steps", type=int, help="Denoising steps. Default: the bundle's own.")
@click.option("--guidance-scale", type=float, help="As runs will have it. Default: the bundle's own.")
@click.option("--scheduler", type=click.Choice(["ddim", "dpm"]), help="Default: the checkpoint's own.")
@click.option(
    "--seed", type=SEED, default=0, show_default=True, help="Of the first prompt; each next one takes one more."
)
@click.option(
    "--speedup",
    "speedups",
    type=float,
    multiple=True,
    help="By what factor transformer calls are to be reduced; again for more. Default: 1.5, 2, 2.6 and 3.",
)
@sizes("Which of the bundle's sizes. Default: its first.", "any", several=False)
@NAMED_ENGINE
@cpu_threads()
@MOVED_CHECKPOINT
@reporting
def calibrate_cache(
    path: Path,
    prompts: Path,
    num_prompts: int | None,
    shape: Shape | None,
    frames: int | None,
    height: int | None,
    width: int | None,
    engine: EngineName,
    threads: int | None,
    checkpoint: Path | None,
    progress: Progress,
    **options: Any,
) -> Result:
    """Find the steps to run for cvx-deploy run --cache fixed, on full runs of the model itself.

    For each speedup: the steps that leave the least forecast error, and how each of the others is best forecast of
    those before it. The table is kept in the bundle, and holds for this size, scheduler, number of steps and guidance
    scale alone; another one is added beside it.

    \b
    Examples:
      cvx-deploy calibrate-cache --model 5b --prompts prompts.txt
      cvx-deploy calibrate-cache --model 5b --prompts prompts.txt --scheduler ddim --speedup 2
    """
    from cvx_deploy.engines.registry import open_backend
    from cvx_deploy.engines.spec import EngineOptions
    from cvx_deploy.pipeline.calibration import calibrate_cache as calibrate
    from cvx_deploy.pipeline.calibration import check_writable_bundle, keep_table
    from cvx_deploy.pipeline.request import networks_needed
    from cvx_deploy.pipeline.shapes import ShapeChoice, bundle_at
    from cvx_deploy.quantize.prompts import read_prompts

    words = read_prompts(prompts, num_prompts)
    wanted = ShapeChoice(shape.frames, shape.height, shape.width) if shape else ShapeChoice(frames, height, width)
    bundle = bundle_at(open_bundle(path, checkpoint), wanted)
    check_writable_bundle(bundle)
    request = _request(bundle, words, **options)
    needed = networks_needed(bundle, request.request)
    how = EngineOptions(threads) if threads else EngineOptions()
    with open_backend(engine, bundle, how, needed=needed, progress=progress) as backend:
        table = calibrate(backend, request, progress)
    keep_table(path, table)
    masks = [{"calls": len(mask.run), "run": list(mask.run)} for mask in table.masks]
    values = {"bundle": str(path), "steps": table.steps, "scheduler": table.scheduler, "masks": masks}
    values |= {"guidance_scale": table.guidance_scale, "shape": str(table.shape), "prompts": table.prompt_count}
    return values, f"{path}: {table}"


def _request(bundle: Any, prompts: tuple[str, ...], **given: Any) -> Any:
    from cvx_deploy.pipeline.calibration import SPEEDUPS, CacheCalibration

    defaults = bundle.manifest.defaults
    own = {"steps": defaults.steps, "guidance_scale": defaults.guidance_scale, "speedups": SPEEDUPS}
    own["scheduler"] = bundle.manifest.scheduler["kind"]
    asked = {name: value for name, value in given.items() if value is not None and value != ()}
    return CacheCalibration(prompts, **{**own, **asked})
