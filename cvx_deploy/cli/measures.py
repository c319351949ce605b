"""Commands that measure a bundle, and that tell beforehand what a model will take."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cvx_deploy.cli.group import cli
from cvx_deploy.cli.options import (
    ENGINES_DIR,
    IMAGE,
    SEED,
    STEPS,
    Result,
    bytes_of,
    given,
    need_extra,
    reference,
    reporting,
    sizes,
    which_bundle,
)
from cvx_deploy.engines.registry import ENGINES
from cvx_deploy.engines.spec import EngineName
from cvx_deploy.families.registry import MODELS
from cvx_deploy.measure.baselines import BASELINES
from cvx_deploy.progress import Progress
from cvx_deploy.shape import Shape

if TYPE_CHECKING:
    from cvx_deploy.bench.results import BenchResults
    from cvx_deploy.exporters.reference.checkpoint import Reference


@cli.command()
@which_bundle
@click.option(
    "--engine",
    "engines",
    type=click.Choice(ENGINES),
    multiple=True,
    help="An engine to measure; repeat for more. Default: onnxruntime.",
)
@click.option(
    "--baseline",
    "baselines",
    type=click.Choice(BASELINES),
    multiple=True,
    help="PyTorch baseline to measure beside the engines; repeat for more. Default: all that this machine can run.",
)
@reference
@sizes("Which of the bundle's sizes. Default: its first.", "any", several=False)
@click.option("--prompt", default="a red circle moves to the right", show_default=True, help="What to show.")
@IMAGE
@click.option("--steps", type=STEPS, help="Denoising steps. Default: the bundle's own.")
@click.option("--guidance-scale", type=float, help="1 turns guidance off. Default: the bundle's own.")
@click.option("--seed", type=SEED, default=0, show_default=True, help="Seed of the video.")
@click.option("--fast", is_flag=True, help="Measure each engine with steps forecast, too, against its own full run.")
@click.option(
    "--runs", type=click.IntRange(1, 1000), default=5, show_default=True, help="Measured rounds, after the warm-up."
)
@click.option("--note", default="", help="A remark for the report, such as what else uses the machine.")
@click.option("--output", type=click.Path(path_type=Path), default="bench", show_default=True, metavar="DIR",
              help="Where bench.json, bench.md and bench.html go.")  # fmt: skip
@click.option("--compare", is_flag=True, help="Measure nothing: compare results that are there, FILES.")
@click.option("--fail-on-regression", is_flag=True, help="With --compare: exit with 1 when something got worse.")
@click.argument("files", nargs=-1, type=click.Path(path_type=Path))
@reporting
def bench(
    path: Path,
    engines: tuple[EngineName, ...],
    reference: "Reference",
    output: Path,
    compare: bool,
    fail_on_regression: bool,
    files: tuple[Path, ...],
    progress: Progress,
    **options: Any,
) -> Result:
    """Measure a bundle against eager PyTorch: seconds, memory, energy, sizes, and how near the pixels are.

    Every peer has a process of its own, and they take turns. The results are written as JSON, as Markdown, and as one
    HTML page that opens offline. Without --model and --bundle, the packaged miniature is measured.

    \b
    Examples:
      cvx-deploy bench --model mini
      cvx-deploy bench --model 5b --engine tensorrt-rtx --steps 10 --output bench/5b
      cvx-deploy bench --compare bench/before/bench.json bench/after/bench.json
    """
    if compare:
        return _compared(files, fail_on_regression)
    if files or fail_on_regression:
        raise click.UsageError("files and --fail-on-regression need --compare")
    need_extra("bench", "psutil", "matplotlib")
    from cvx_deploy.bench.bench import bench as measure
    from cvx_deploy.bench.html import page
    from cvx_deploy.bench.markdown import report

    results = measure(_request(path, engines or ("onnxruntime",), reference, **options), progress)
    places = _write(results, output, {"bench.md": report(results), "bench.html": page(results)})
    return {"files": places, **_as_dict(results)}, f"{report(results, short=True)}\n" + "\n".join(places)


def _request(
    path: Path,
    engines: tuple[EngineName, ...],
    reference: "Reference",
    *,
    baselines: tuple[Any, ...],
    shape: Shape | None,
    frames: int | None,
    height: int | None,
    width: int | None,
    runs: int,
    note: str,
    fast: bool,
    prompt: str,
    steps: int | None,
    guidance_scale: float | None,
    **video: Any,
) -> Any:
    from cvx_deploy.bench.bench import BenchRequest
    from cvx_deploy.bundle.opened import Bundle
    from cvx_deploy.pipeline.request import RunRequest
    from cvx_deploy.pipeline.shapes import ShapeChoice, bundle_at

    wanted = ShapeChoice(shape.frames, shape.height, shape.width) if shape else ShapeChoice(frames, height, width)
    bundle = bundle_at(Bundle.open(path), wanted, None)
    defaults = bundle.manifest.defaults
    request = RunRequest(
        (prompt,),
        "video.mp4",
        steps=defaults.steps if steps is None else steps,
        guidance_scale=defaults.guidance_scale if guidance_scale is None else guidance_scale,
        **video,
    )
    return BenchRequest(bundle, engines, baselines or BASELINES, reference, request, runs, note, fast)


def _write(results: "BenchResults", output: Path, texts: dict[str, str]) -> list[str]:
    """Write the three forms of some results, and return where they lie."""
    from cvx_deploy.bench.results import write_results
    from cvx_deploy.files import staged_file

    output.mkdir(parents=True, exist_ok=True)
    write_results(results, output / "bench.json")
    for name, text in texts.items():
        with staged_file(output / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return [str(output / name) for name in ("bench.json", *texts)]


def _as_dict(results: "BenchResults") -> dict[str, Any]:
    from dataclasses import asdict

    return asdict(results)


def _compared(files: tuple[Path, ...], fail: bool) -> Result:
    """Compare results, the first with each of the others."""
    if len(files) < 2:
        raise click.UsageError("--compare needs two files or more: the first is what the others are compared with")
    from cvx_deploy.bench.compare import compare
    from cvx_deploy.bench.results import read_results

    found = compare([(str(file), read_results(file)) for file in files])
    values = found.as_dict()
    if fail and found.regressions:
        what = f"{len(found.regressions)} figures got worse: {', '.join(map(str, found.regressions))}"
        values["error"] = {"type": "CvxError", "what": what, "fix": "see the table, or measure again"}
    return values, str(found)


@cli.command()
@click.option("--model", required=True, type=click.Choice(list(MODELS)), help="A published model.")
@click.option(
    "--vram", type=bytes_of, metavar="SIZE", help="Available GPU memory, such as 12GB. Default: that of --gpu."
)
@click.option("--gpu", metavar="NAME", help="Also estimate the least time on a GPU such as rtx4090.")
@sizes("A video size, such as 49x480x720.", "the model's", several=False)
@click.option("--steps", type=STEPS, default=50, show_default=True, help="Denoising steps of a video.")
@click.option("--no-guidance", is_flag=True, help="One sample per step instead of two, as with --guidance-scale 1.")
@click.option("--train", is_flag=True, help="Tell what training takes instead, by examples/finetune.")
@click.option("--rank", type=click.IntRange(1, 4096), help="Rank of the adapters, with --train. Default: 64.")
@ENGINES_DIR
@reporting
def plan(
    model: str,
    vram: int | None,
    gpu: str | None,
    shape: Shape | None,
    frames: int | None,
    height: int | None,
    width: int | None,
    steps: int,
    no_guidance: bool,
    train: bool,
    rank: int | None,
    engines_dir: Path,
    progress: Progress,
) -> Result:
    """Tell what a published model takes, before anything is fetched, exported or built.

    Memory by stage and precision, what fits, disk, and the least time of a step: by the compiled plan where the engines
    folder has a built bundle of that name, else by the operations and bytes of the architecture.

    \b
    Examples:
      cvx-deploy plan --model 5b --vram 12GB
      cvx-deploy plan --model 2b --gpu rtx4090 --frames 25 --json
      cvx-deploy plan --model 5b --train --vram 80GB
    """
    if rank is not None and not train:
        raise click.UsageError("--rank goes with --train")
    if train and (of_run := sorted(given() & {"steps", "no_guidance"})):
        raise click.UsageError(f"--{of_run[0].replace('_', '-')} is of a run, and says nothing of training")
    from cvx_deploy.engines.gpus import gpu_named
    from cvx_deploy.estimate.compiled import step_seconds
    from cvx_deploy.estimate.estimate import plan as plan_model

    named, known = None if gpu is None else gpu_named(gpu), MODELS[model]
    wanted = shape or Shape(frames or known.frames, height or known.height, width or known.width)
    if train:
        from cvx_deploy.estimate.training import training_plan

        told = training_plan(known, wanted, rank or 64, vram or (named.memory if named else None))
        return told.as_dict(), str(told)
    compiled = step_seconds(engines_dir / model, wanted, named, guided=not no_guidance) if named else {}
    found = plan_model(known, wanted, vram=vram, gpu=named, guided=not no_guidance, steps=steps, compiled=compiled)
    return found.as_dict(), str(found)
