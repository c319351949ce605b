"""The command that makes the videos of a whole file of prompts."""

from pathlib import Path
from typing import Any

import click

from cvx_deploy.cli.group import cli
from cvx_deploy.cli.options import (
    ENGINE,
    ENGINES_DIR,
    RAY,
    VRAM,
    Result,
    cpu_threads,
    need_extra,
    plain_name,
    reporting,
)
from cvx_deploy.engines.auto import chosen
from cvx_deploy.engines.registry import engine_spec
from cvx_deploy.engines.spec import EngineName, EngineOptions
from cvx_deploy.miniatures import bundle_folder
from cvx_deploy.progress import Progress

_MOST_WORKERS = 4096


@cli.command()
@click.argument("prompts", type=click.Path(path_type=Path), metavar="PROMPTS.jsonl")
@click.option(
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    required=True,
    metavar="DIR",
    help="The folder of the videos and of manifest.jsonl, which has a line for each.",
)
@click.option(
    "--model",
    default="mini",
    show_default=True,
    metavar="NAME",
    callback=plain_name,
    help="A bundle of the engines folder, or a miniature.",
)
@ENGINES_DIR
@ENGINE
@cpu_threads("one per core; of a worker with --ray, its share")
@VRAM
@RAY
@click.option(
    "--workers", type=click.IntRange(1, _MOST_WORKERS), help="With --ray, how many. Default: all that have room."
)
@reporting
def batch(
    prompts: Path,
    output: Path,
    model: str,
    engines_dir: Path,
    engine: EngineName,
    threads: int | None,
    vram: int | None,
    ray_address: str | None,
    workers: int | None,
    progress: Progress,
) -> Result:
    """Make the videos of a file of prompts, thousands if need be; a second run makes what is missing only.

    PROMPTS.jsonl has a JSON object in each line, such as {"prompt": "a red circle", "seed": 7, "id": "circle"};
    docs/batch.md has the fields. --ray needs the extra ray.

    \b
    Examples:
      cvx-deploy batch prompts.jsonl --output videos
      cvx-deploy batch prompts.jsonl --output videos --model 5b --engine tensorrt
      cvx-deploy batch prompts.jsonl --output videos --model 5b --ray 10.0.0.1:6379
    """
    from cvx_deploy.batch.lines import tasks_of
    from cvx_deploy.batch.run import batch as batch_of
    from cvx_deploy.batch.run import here
    from cvx_deploy.bundle.opened import Bundle
    from cvx_deploy.bundle.pack import identity
    from cvx_deploy.pipeline.pipeline import Pipeline

    if workers is not None and ray_address is None:
        raise click.UsageError("--workers means nothing without --ray")
    options = EngineOptions(threads=threads, vram=vram)
    if ray_address is not None:
        need_extra("ray", "ray")
    bundle = Bundle.open(bundle_folder(model, engines_dir))
    engine = chosen(engine, bundle, options, progress=progress).engine
    engine_spec(engine).check(options)
    tasks = tasks_of(prompts, bundle, f"{identity(bundle)} {engine}")
    if ray_address is not None:
        values = _through_ray(ray_address, workers, bundle, engine, options, (tasks, output, progress))
    else:
        with Pipeline(bundle, engine, options) as pipeline:
            values = batch_of(tasks, output, here(pipeline), progress)
    return _told(values)


def _through_ray(
    address: str, workers: int | None, bundle: Any, engine: EngineName, options: EngineOptions, work: Any
) -> dict[str, Any]:
    from cvx_deploy.batch.run import batch as batch_of
    from cvx_deploy.cluster.bundles import Known
    from cvx_deploy.cluster.joined import joined

    tasks, output, progress = work
    on_gpu = engine_spec(engine).on_gpu
    with joined(address) as cluster:
        from cvx_deploy.batch.pool import Pool, spread
        from cvx_deploy.cluster.source import source_of

        count, cpus = cluster.workers(on_gpu=on_gpu, workers=workers, threads=options.threads)
        known = Known.of(bundle)
        with source_of([known]) as source:
            pool = Pool(known, source, engine, None if on_gpu else cpus, options.vram, count, cpus)
            return batch_of(tasks, output, spread(pool), progress)


def _told(values: dict[str, Any]) -> Result:
    failed = len(values["failed"])
    text = f"{values['made']} made, {values['there_before']} there before, in {values['folder']}"
    if failed:
        first = next(iter(values["failed"]))
        values["error"] = {
            "type": "CvxError",
            "what": f"{failed} of {values['videos']} videos could not be made, the first of them {first}",
            "fix": f"see {values['folder']}/manifest.jsonl, mend what it says, and run the command again",
        }
    return values, text
