"""The command that serves videos over HTTP."""

import os
from dataclasses import replace
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
    bytes_of,
    cpu_threads,
    need_extra,
    plain_name,
    reporting,
)
from cvx_deploy.cli.videos import devices_of
from cvx_deploy.engines.auto import chosen
from cvx_deploy.engines.registry import engine_spec
from cvx_deploy.engines.spec import EngineName, EngineOptions
from cvx_deploy.errors import CvxError
from cvx_deploy.miniatures import bundle_folder
from cvx_deploy.progress import Progress

_MOST_WORKERS = 64


def _plain_names(context: click.Context, parameter: click.Parameter, names: tuple[str, ...]) -> tuple[str, ...]:
    for name in names:
        plain_name(context, parameter, name)
    return tuple(dict.fromkeys(names))


@cli.command()
@click.option(
    "--model",
    "models",
    multiple=True,
    default=("mini",),
    show_default=True,
    metavar="NAME",
    callback=_plain_names,
    help="A bundle of the engines folder, or a miniature; again for more. The first is what clients get by default.",
)
@ENGINES_DIR
@ENGINE
@cpu_threads("a worker's share of the cores")
@click.option("--devices", type=devices_of, metavar="N[,N]", help="GPUs, one worker each. Default: 0.")
@click.option(
    "--workers",
    type=click.IntRange(1, _MOST_WORKERS),
    help="Worker processes of an engine on CPUs. Default: 1; with --ray, all that have room.",
)
@VRAM
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 takes a free one.")
@click.option(
    "--data",
    type=click.Path(path_type=Path, file_okay=False),
    default="served",
    show_default=True,
    metavar="DIR",
    help="The folder of the queue and the videos.",
)
@click.option(
    "--api-keys",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Hashes of the keys that come in.",
)
@click.option("--new-key", metavar="NAME", help="Make a key, add its hash to --api-keys, print it, and do no more.")
@click.option("--no-auth", is_flag=True, help="Let everybody in who can reach a --host beyond this machine.")
@click.option(
    "--retention", type=click.FloatRange(0.01, 24 * 366), default=24.0, show_default=True, help="Hours a job is kept."
)
@click.option("--disk", type=bytes_of, metavar="SIZE", help="Bytes for all videos; the oldest go first. Default: all.")
@click.option("--queue", type=click.IntRange(1), default=1000, show_default=True, help="Jobs that may wait.")
@click.option(
    "--jobs-per-key", type=click.IntRange(1), default=100, show_default=True, help="Jobs of a key that wait or run."
)
@click.option(
    "--patience",
    type=click.FloatRange(1),
    default=1800.0,
    show_default=True,
    help="Seconds without a sign of life after which a worker is taken to hang.",
)
@RAY
@reporting
def serve(
    new_key: str | None, api_keys: Path | None, ray_address: str | None, progress: Progress, **options: Any
) -> Result:
    """Serve videos over HTTP: OpenAI's video API, with a queue that loses nothing.

    docs/serving.md describes the API and its limits. Needs the extra serve.

    \b
    Examples:
      cvx-deploy serve
      cvx-deploy serve --model 5b --engine tensorrt --devices 0,1
      cvx-deploy serve --model 5b --engine tensorrt --ray 10.0.0.1:6379
      cvx-deploy serve --api-keys keys.txt --new-key alice
      cvx-deploy serve --model 5b --host 0.0.0.0 --api-keys keys.txt
    """
    need_extra("serve", "fastapi", "uvicorn", "prometheus_client", "python_multipart")
    from cvx_deploy.serve.keys import add_key

    if new_key is not None:
        if api_keys is None:
            raise click.UsageError("--new-key needs --api-keys FILE")
        key = add_key(api_keys, new_key)
        return {"name": new_key, "key": key, "file": str(api_keys)}, key
    from cvx_deploy.serve.server import serve as serve_until_ended

    if ray_address is None:
        counts = serve_until_ended(_settings(api_keys=api_keys, progress=progress, **options), progress)
    else:
        counts = _through_ray(ray_address, progress, api_keys=api_keys, **options)
    return {"jobs": counts}, ", ".join(f"{count} {status}" for status, count in counts.items())


def _through_ray(address: str, progress: Progress, **options: Any) -> dict[str, Any]:
    need_extra("ray", "ray")
    from cvx_deploy.cluster.joined import joined

    if options["devices"] is not None:
        raise click.UsageError("--devices means nothing with --ray, which gives every worker a GPU; use --workers")
    settings = _settings(**options | {"workers": None}, progress=progress, elsewhere=True)
    on_gpu = engine_spec(settings.engine).on_gpu
    with joined(address) as cluster:
        from cvx_deploy.cluster.bundles import Known
        from cvx_deploy.cluster.source import source_of
        from cvx_deploy.serve.ray_worker import RayWorkers
        from cvx_deploy.serve.server import serve as serve_until_ended

        workers, cpus = cluster.workers(on_gpu=on_gpu, workers=options["workers"], threads=options["threads"])
        threads = None if on_gpu else cpus
        settings = replace(settings, devices=tuple(range(workers)), options=replace(settings.options, threads=threads))
        with source_of([Known.of(bundle) for bundle in settings.models.values()]) as source:
            return serve_until_ended(settings, progress, RayWorkers(settings, cpus, source).hire)


def _settings(
    *,
    models: tuple[str, ...],
    engines_dir: Path,
    engine: EngineName,
    devices: tuple[int, ...] | None,
    workers: int | None,
    threads: int | None,
    vram: int | None,
    queue: int,
    jobs_per_key: int,
    retention: float,
    no_auth: bool,
    progress: Progress,
    **options: Any,
) -> Any:
    from cvx_deploy.bundle.opened import Bundle
    from cvx_deploy.serve.settings import Limits, ServeSettings

    bundles = {name: Bundle.open(bundle_folder(name, engines_dir)) for name in models}
    how = EngineOptions(threads=threads, vram=vram)
    engine = chosen(engine, bundles[models[0]], how, devices=devices or (), progress=progress).engine
    on_gpu = engine_spec(engine).on_gpu
    if devices is not None and not on_gpu:
        raise click.UsageError(f"--devices means nothing to --engine {engine}; use --workers")
    if workers is not None and on_gpu:
        raise click.UsageError(f"--workers means nothing to --engine {engine}; use --devices")
    if workers is not None and workers > (os.cpu_count() or 1) and threads is None:
        raise CvxError(f"{workers} workers on {os.cpu_count()} cores", fix="use fewer --workers, or say --threads 1")
    return ServeSettings(
        bundles,
        engine=engine,
        options=how,
        devices=devices or tuple(range(workers or 1)),
        open_to_all=no_auth,
        retention=retention * 3600,
        limits=Limits(queue=queue, jobs_per_key=jobs_per_key),
        **options,
    )
