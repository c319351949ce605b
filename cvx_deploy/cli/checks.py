"""The command that proves parity."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cvx_deploy.cli.group import cli
from cvx_deploy.cli.options import (
    SEED,
    STEPS,
    Result,
    need_export_extra,
    need_extra,
    reference,
    reporting,
    shape_of,
    which_bundle,
)
from cvx_deploy.engines.registry import ENGINES
from cvx_deploy.engines.spec import EngineName
from cvx_deploy.progress import Progress
from cvx_deploy.shape import Shape

if TYPE_CHECKING:
    from cvx_deploy.exporters.reference.checkpoint import Reference


@cli.command()
@which_bundle
@reference
@click.option(
    "--engine",
    type=click.Choice(ENGINES),
    help="The last rung; it fails where this cannot run. Default: onnxruntime, for bf16 openvino; skipped for fp8.",
)
@click.option(
    "--level",
    type=click.Choice(["networks", "trajectory", "video"]),
    default="video",
    show_default=True,
    help="Networks alone; the latents of every step, too; whole videos, too.",
)
@click.option(
    "--fast",
    is_flag=True,
    help="Also hold a video made with run --fast against the engine's own full run, in the bundle's own steps.",
)
@click.option("--shape", "shapes", type=shape_of, multiple=True, metavar="FxHxW", help="A size of it. Default: all.")
@click.option("--prompt", metavar="TEXT", help="What is shown. Default: a red circle.")
@click.option("--steps", type=STEPS, default=4, show_default=True, help="Denoising steps.")
@click.option("--seed", type=SEED, default=0, show_default=True, help="Of the noise.")
@click.option(
    "--output", type=click.Path(path_type=Path), metavar="DIR", help="Write check.json, .md, junit.xml, frames there."
)
@click.option(
    "--reduce",
    is_flag=True,
    help="Cut what an engine refuses, or runs wrong, down to the smallest ONNX that still shows it, in --output.",
)
@reporting
def check(
    path: Path,
    reference: "Reference",
    engine: EngineName | None,
    level: str,
    shapes: tuple[Shape, ...],
    prompt: str | None,
    steps: int,
    seed: int,
    fast: bool,
    output: Path | None,
    reduce: bool,
    progress: Progress,
) -> Result:
    """Hold a bundle against diffusers, rung by rung: eager, ONNX, rewritten, quantized, engine.

    Exit code 1 names the first rung that fails, and the layers at which the networks part.

    \b
    Examples:
      cvx-deploy check --model mini
      cvx-deploy check --model 5b --engine openvino --level networks --output report
      cvx-deploy check --model 5b --engine tensorrt-rtx --level networks --reduce --output report
    """
    if reduce and output is None:
        raise click.UsageError("--reduce needs --output, for what is left")
    if fast and level != "video":
        raise click.UsageError("--fast is judged by whole videos: leave --level out")
    need_export_extra("torch", "diffusers", "transformers", "onnx", "skimage")
    from cvx_deploy.bundle.opened import Bundle
    from cvx_deploy.parity.check import PROMPT, CheckRequest
    from cvx_deploy.testing import parity

    if reduce:
        need_extra("debug", "polygraphy", "onnx_graphsurgeon")
    asked = CheckRequest(engine, level, prompt or PROMPT, steps, seed, shapes)  # type: ignore[arg-type]
    request = replace(asked, fast=fast, reduce=output if reduce else None)
    found = parity(Bundle.open(path), reference, request, progress, output)
    values = found.as_dict()
    if found.error is not None:
        values["error"] = {"type": "ParityError", "what": found.error.what, "fix": found.error.fix}
    return values, str(found)
