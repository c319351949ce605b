"""The command that makes videos."""

import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from cvx_deploy.cli.group import cli
from cvx_deploy.cli.longer import Long, chain_result, long_options, way_of
from cvx_deploy.cli.options import (
    ENGINE,
    IMAGE,
    MOVED_CHECKPOINT,
    VRAM,
    Result,
    bytes_of,
    cpu_threads,
    given,
    open_bundle,
    reporting,
    sizes,
    which_bundle,
)
from cvx_deploy.engines.auto import AUTO
from cvx_deploy.engines.registry import engine_spec
from cvx_deploy.engines.residency import Policy
from cvx_deploy.engines.spec import EngineName, EngineOptions
from cvx_deploy.precision import Precision
from cvx_deploy.progress import Progress
from cvx_deploy.shape import Shape
from cvx_deploy.terminal import LONGEST_PATH, safe

if TYPE_CHECKING:
    from cvx_deploy.bundle.opened import Bundle
    from cvx_deploy.pipeline.pipeline import Pipeline

_DEVICES = "GPUs to spread videos over; two run both branches of guidance of a single one at once. Default: 0."


def devices_of(text: str) -> tuple[int, ...]:
    """Return the GPUs that 0, or 0,1, means."""
    if not re.fullmatch(r"\d{1,4}(,\d{1,4})*", text):
        raise click.BadParameter(f"{text!r} is not a GPU's number, or several such as 0,1")
    numbers = tuple(map(int, text.split(",")))
    if len(set(numbers)) < len(numbers):
        raise click.BadParameter(f"{text!r} names a GPU twice")
    return numbers


@cli.command()
@which_bundle
@click.option("--prompt", "prompts", multiple=True, metavar="TEXT", help="What to show; repeat it for several videos.")
@click.option("--negative-prompt", default="", metavar="TEXT", help="What the video should not show.")
@IMAGE
@click.option(
    "--video", type=click.Path(path_type=Path), metavar="FILE|DIR", help="A clip, or a folder of frames, to start from."
)
@click.option(
    "--strength",
    type=float,
    default=0.8,
    show_default=True,
    help="Denoising strength for --video, above 0 and up to 1: 1 keeps nothing of it.",
)
@click.option("--steps", type=int, help="Denoising steps. Default: the bundle's own, 50 for the published models.")
@click.option(
    "--guidance-scale",
    type=float,
    help="How strongly the prompt steers; 1 turns guidance off. Default: the bundle's own, 6 for the published models.",
)
@click.option("--dynamic-cfg", is_flag=True, help="Let the guidance scale change over the steps, as diffusers does.")
@click.option(
    "--fast",
    is_flag=True,
    help="Run half of the steps and forecast the others: see docs/step-cache.md for what is lost.",
)
@click.option(
    "--cache",
    type=click.Choice(["fixed", "adaptive"]),
    help="Forecast steps: at places fixed beforehand, or where the prediction changes little.",
)
@click.option(
    "--cache-speedup", type=float, help="For --cache fixed: by what factor transformer calls are reduced. Default: 2."
)
@click.option(
    "--cache-tolerance",
    type=float,
    help="For --cache adaptive: how much the prediction may have changed before a step is run. Default: 0.1, dpm 0.05.",
)
@click.option("--scheduler", type=click.Choice(["ddim", "dpm"]), help="Default: the checkpoint's own.")
@click.option(
    "--seed", type=int, default=0, show_default=True, help="Seed of the first video; each next video takes one more."
)
@click.option("--num-videos", type=int, default=1, show_default=True, help="Videos per prompt.")
@click.option("--vae-tiling", is_flag=True, help="Decode tile by tile: less memory, slightly different pixels.")
@click.option(
    "--latents-dtype",
    type=click.Choice(get_args(Precision)),
    default="fp32",
    show_default=True,
    help="Draw noise and round latents as a diffusers pipeline of this type does.",
)
@click.option("--save-latents", type=click.Path(path_type=Path), metavar="FILE.npy", help="Save the finished latents.")
@click.option(
    "--from-latents",
    type=click.Path(path_type=Path),
    metavar="FILE.npy",
    help="Decode these finished latents, and denoise nothing.",
)
@click.option(
    "--contact-sheet",
    type=click.Path(path_type=Path),
    metavar="FILE.png",
    help="Save a picture of some frames as well.",
)
@sizes("Which of the bundle's sizes. Default: its first, or what the latents fit.", "any", several=False)
@long_options
@click.option(
    "--fps",
    type=click.IntRange(1, 120),
    help="Frames a second of the file; those between the model's own are made by optical flow. Default: the model's.",
)
@click.option(
    "--freenoise", is_flag=True, help="For windows: start later frames from the noise of earlier ones, shuffled."
)
@click.option(
    "--windows-at-once",
    type=int,
    default=1,
    show_default=True,
    help="Windows that go through the transformer together, each with both branches of guidance. An engine of "
    "TensorRT's, built for a batch of 2, holds two without guidance.",
)
@click.option("--loop", is_flag=True, help="Let the end lead back to the beginning, by windows that reach over it.")
@ENGINE
@cpu_threads()
@click.option("--devices", type=devices_of, metavar="N[,N]", help=_DEVICES)
@VRAM
@click.option(
    "--ram",
    type=bytes_of,
    metavar="SIZE",
    help="Memory that an engine on a CPU may use, mapped weights left out. Default: all that this process may have.",
)
@click.option(
    "--no-cuda-graphs", is_flag=True, help="Launch a tensorrt engine's kernels one by one, without CUDA graphs."
)
@click.option(
    "--prompt-cache", type=click.Path(path_type=Path), metavar="DIR", help="Keep prompt embeddings in this folder."
)
@click.option("--check-finite", is_flag=True, help="Stop at the first NaN or infinity that any network puts out. Slow.")
@MOVED_CHECKPOINT
@click.option(
    "--output",
    default="video.mp4",
    show_default=True,
    metavar="FILE|DIR/",
    help="A .mp4, .webm, .gif or .npy file, or a folder for PNG frames.",
)
@reporting
def run(
    path: Path,
    engine: EngineName,
    threads: int | None,
    devices: tuple[int, ...] | None,
    vram: int | None,
    ram: int | None,
    no_cuda_graphs: bool,
    prompt_cache: Path | None,
    check_finite: bool,
    checkpoint: Path | None,
    shape: Shape | None,
    frames: int | None,
    height: int | None,
    width: int | None,
    long: Long,
    freenoise: bool,
    loop: bool,
    windows_at_once: int,
    progress: Progress,
    **options: Any,
) -> Result:
    """Make videos from prompts, and from an image or a video where the model takes one.

    Without --model and --bundle, a miniature that comes with the package is used: mini, or mini-i2v with --image. It
    draws one simple shape that moves, and nothing else.

    \b
    Examples:
      cvx-deploy run --prompt "a red circle moves to the right"
      cvx-deploy run --model 5b --prompt "a panda plays guitar" --output panda.mp4
      cvx-deploy run --model 5b-i2v --image panda.png --prompt "the panda waves" --seed 7
      cvx-deploy run --model 5b --engine tensorrt --vram 12GB --prompt "a panda plays guitar"
    """
    from cvx_deploy.pipeline.combinations import check_combination
    from cvx_deploy.pipeline.pipeline import Pipeline
    from cvx_deploy.pipeline.request import RunRequest
    from cvx_deploy.pipeline.shapes import ShapeChoice
    from cvx_deploy.pipeline.windows import bundle_and_windows

    # One prompt needs each network once: then those of one phase alone are held.
    residency: Policy = "resident" if len(options["prompts"]) > 1 else "phase"
    how = EngineOptions(threads, 0, vram, not no_cuda_graphs, residency, ram)
    _check_engine(engine, how, devices)
    check_combination(given())

    def opened(bundle: "Bundle", residency: Policy = "phase") -> "Pipeline":
        return Pipeline(
            bundle,
            engine,
            replace(how, residency=residency),
            devices=devices or (),
            check_finite=check_finite,
            prompt_cache=prompt_cache,
            progress=progress,
        )

    bundle = open_bundle(path, checkpoint)
    defaults = bundle.manifest.defaults
    wanted = ShapeChoice(shape.frames, shape.height, shape.width) if shape else ShapeChoice(frames, height, width)
    count = long.frames(wanted.frames, bundle.manifest.fps)
    way = way_of(long, bundle, count, wanted.height, wanted.width, windows=freenoise or loop or windows_at_once > 1)
    if way == "chain":
        return chain_result(long, bundle, opened, count, (wanted.height, wanted.width), options, progress)
    if options["from_latents"] is None:
        options["steps"] = defaults.steps if options["steps"] is None else options["steps"]
        if options["guidance_scale"] is None:
            options["guidance_scale"] = defaults.guidance_scale
    else:
        options = {key: value for key, value in options.items() if value is not None}
    request = RunRequest(**options)
    bundle, windows = bundle_and_windows(
        bundle,
        replace(wanted, frames=count),
        request.from_latents,
        overlap=long.overlap,
        freenoise=freenoise,
        loop=loop,
        at_once=windows_at_once,
    )
    request = replace(request, windows=windows)
    with opened(bundle, how.residency) as pipeline:
        engine, report = pipeline.engine, pipeline.run(request)
    for row in _time_table(report.stages):
        progress.note(row)
    if report.branches_apart:
        progress.note("both branches of guidance ran at once, on two devices")
    for video, taken in sorted(report.steps.items()):
        progress.note(f"video {video + 1}: {taken}")
    values = {
        "videos": [str(video) for video in report.paths],
        "seeds": report.seeds,
        "seconds": {stage: round(seconds, 4) for stage, seconds in report.stages.items()},
        "cached_prompts": report.cached_prompts,
        "steps": [asdict(report.steps[video]) for video in sorted(report.steps)],
        "branches_apart": report.branches_apart,
        "fps": report.fps,
        "interpolated": report.interpolated,
        "shape": str(bundle.shape if windows is None else windows.shape),
        "windows": None if report.windows is None else report.windows.as_json,
        "engine": engine,
        "precision": bundle.manifest.precision,
        "bundle": str(path),
    }
    return values, "\n".join(safe(video, LONGEST_PATH) for video in report.paths)


def _check_engine(engine: EngineName, options: EngineOptions, devices: tuple[int, ...] | None) -> None:
    """Refuse options that mean nothing to an engine."""
    if engine == AUTO:
        return
    given = options.given() | ({"device"} if devices is not None else set())
    for name in sorted(given & set(_FLAGS) - engine_spec(engine).takes):
        raise click.UsageError(f"{_FLAGS[name]} means nothing to --engine {engine}")


_FLAGS = {
    "threads": "--threads",
    "device": "--devices",
    "vram": "--vram",
    "ram": "--ram",
    "cuda_graphs": "--no-cuda-graphs",
}


def _time_table(stages: dict[str, float]) -> list[str]:
    width = max(map(len, (*stages, "total")))
    rows = [*stages.items(), ("total", sum(stages.values()))]
    return [f"{name:<{width}}  {seconds:8.2f} s" for name, seconds in rows]
