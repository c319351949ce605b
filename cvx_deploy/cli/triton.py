"""The command that makes a bundle a model of Triton Inference Server."""

from pathlib import Path

import click

from cvx_deploy.cli.group import cli
from cvx_deploy.cli.options import NAMED_ENGINE, VRAM, Result, cpu_threads, reporting, which_bundle
from cvx_deploy.engines.spec import EngineName, EngineOptions
from cvx_deploy.progress import Progress


@cli.command()
@which_bundle
@click.option(
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="The model repository; other models in it stay as they are.",
)
@NAMED_ENGINE
@cpu_threads()
@VRAM
@click.option("--force", is_flag=True, help="Replace an earlier model of that name.")
@reporting
def triton(
    path: Path,
    output: Path,
    engine: EngineName,
    threads: int | None,
    vram: int | None,
    force: bool,
    progress: Progress,
) -> Result:
    """Write a model of Triton Inference Server that runs a bundle, where it lies, and tells of each step.

    Its Python backend needs this package; docs/serving.md has a client.

    \b
    Examples:
      cvx-deploy triton --model mini --output model_repository
      cvx-deploy triton --model 5b --engine tensorrt --output model_repository --force
    """
    from cvx_deploy.bundle.opened import Bundle
    from cvx_deploy.serve.triton.config import write_model

    folder = write_model(Bundle.open(path), engine, EngineOptions(threads=threads, vram=vram), output, replace=force)
    return {"model": folder.name, "folder": str(folder), "engine": engine}, str(folder)
