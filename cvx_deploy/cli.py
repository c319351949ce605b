"""The command line: parse, call one function, print.

Results go to stdout, progress and notes to stderr. With ``--json`` stdout holds one JSON object and nothing else, on
failure too. Exit codes: 0 done, 1 a stated failure, 2 wrong usage, 130 interrupted. Heavy imports happen inside the
commands, so that ``--help`` is instant.
"""

import functools
import json
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import click

from cvx_deploy import __version__
from cvx_deploy.errors import CvxError
from cvx_deploy.models import MODELS
from cvx_deploy.progress import Progress, RichProgress, SilentProgress

Result = tuple[dict[str, Any], str]
"""What a command returns: the JSON object, and the text that says the same to a person."""

Command = Callable[..., Any]


def main() -> NoReturn:
    """Run the command line and exit."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that staged files are swept up
    interrupts: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        interrupts.append(number)
        signal.default_int_handler(number, frame)

    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as a shell has it for what it runs in the background
        signal.signal(signal.SIGINT, interrupt)
    try:
        try:
            code = cli.main(prog_name="cvx-deploy", standalone_mode=False)
        except (Exception, KeyboardInterrupt) as error:
            # An extension that is interrupted while it is imported raises an error of its own.
            code = _interrupted() if interrupts else _failed(error)
    except BrokenPipeError:
        _drop_stdout()
        code = 1
    sys.exit(code if isinstance(code, int) else 0)


def _failed(error: BaseException) -> int:
    """Say what went wrong and return the exit code; an error of the program itself is raised again."""
    if isinstance(error, click.ClickException):
        _fail(type(error).__name__, error.format_message(), "see --help")
        error.show()
        return error.exit_code
    if isinstance(error, KeyboardInterrupt | click.Abort):
        return _interrupted()
    if isinstance(error, UnicodeEncodeError):
        error = CvxError(f"{error.object!r} is not UTF-8", fix="use a name, or a prompt, that is")
    elif isinstance(error, OSError) and not isinstance(error, BrokenPipeError):
        place = "the output" if error.filename is None else os.fsdecode(error.filename)
        error = CvxError(f"{place}: {error.strerror or error}", fix="check the path, its permissions and its disk")
        try:
            sys.stdout.flush()
        except OSError:
            _drop_stdout()
    if isinstance(error, CvxError):
        return _stated(error)
    raise error


def _interrupted() -> int:
    _fail("Interrupted", "interrupted", "run the command again")
    click.echo("interrupted", err=True)
    return 130


def _drop_stdout() -> None:
    """Let go of a reader that has gone or a disk that is full, so that the interpreter's own flush does not fail."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _stated(error: CvxError) -> int:
    _fail(type(error).__name__, error.what, error.fix)
    click.echo("error: " + " ".join(str(error).splitlines()), err=True)
    return 1


def _fail(kind: str, what: str, fix: str) -> None:
    """Print the one JSON object of a command that was asked for one and has failed."""
    if "--json" in sys.argv:
        click.echo(json.dumps({"error": {"type": kind, "what": what, "fix": fix}}))


def _reporting(function: Callable[..., Result]) -> Command:
    """Give a command ``--json`` and ``--quiet``, hand it a `Progress`, and print what it returns."""

    @click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
    @click.option("--quiet", "-q", is_flag=True, help="No progress bars and notes.")
    @functools.wraps(function)
    def command(*, as_json: bool, quiet: bool, **options: Any) -> None:
        progress: Progress = SilentProgress() if quiet else RichProgress()
        values, text = function(progress=progress, **options)
        click.echo(json.dumps(values, indent=2) if as_json else text)

    return command


def _plain_name(_: click.Context, __: click.Parameter, name: str | None) -> str | None:
    """Refuse a bundle's name that would lead out of the engines folder."""
    if name is not None and not re.fullmatch(r"\w[\w.-]*", name):
        raise click.BadParameter(f"{name!r} is not a plain name (letters, digits, '.', '_' and '-')")
    return name


def _which_bundle(command: Command) -> Command:
    """Give a command the options that name a bundle, as one argument ``path``."""

    @click.option("--model", metavar="NAME", callback=_plain_name, help="The bundle NAME in the engines folder.")
    @click.option("--bundle", type=click.Path(path_type=Path), metavar="DIR", help="A bundle anywhere.")
    @_ENGINES_DIR
    @functools.wraps(command)
    def named(*, model: str | None, bundle: Path | None, engines_dir: Path, **options: Any) -> Any:
        if (model is None) == (bundle is None):
            raise click.UsageError("name a bundle with --model NAME or --bundle DIR")
        return command(path=bundle or engines_dir / str(model), **options)

    return named


_ENGINES_DIR = click.option(
    "--engines-dir",
    type=click.Path(path_type=Path),
    default="engines",
    envvar="CVX_ENGINES_DIR",
    show_default=True,
    show_envvar=True,
    help="Where bundles live by their names.",
)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, package_name="cvx-deploy")
def cli() -> None:
    """Take CogVideoX from a checkpoint to a video without PyTorch at run time.

    \b
    Try it without a download:
      cvx-deploy synth --like 2b --scale tiny --output checkpoints/tiny
      cvx-deploy export --model tiny --checkpoint checkpoints/tiny
      cvx-deploy run --model tiny --prompt "a red circle" --steps 4 --output tiny.mp4
    """


@cli.command()
@click.option("--like", required=True, type=click.Choice(list(MODELS)), help="The model to imitate.")
@click.option(
    "--scale",
    type=click.Choice(["tiny", "full"]),
    default="tiny",
    show_default=True,
    help="A few MB, or the real size.",
)
@click.option("--output", required=True, type=click.Path(path_type=Path), metavar="DIR", help="A folder that is new.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the random weights.")
@_reporting
def synth(like: str, scale: str, output: Path, seed: int, progress: Progress) -> Result:
    """Write a checkpoint with random weights, in the layout of the published ones.

    \b
    Example:
      cvx-deploy synth --like 5b --scale full --output checkpoints/5b-random
    """
    _need_export_extra()
    from cvx_deploy.exporters.synth import synthesize

    synthesize(like, scale, output, seed=seed, progress=progress)  # type: ignore[arg-type]
    size = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
    return {"checkpoint": str(output), "like": like, "scale": scale, "seed": seed, "bytes": size}, str(output)


@cli.command()
@click.option(
    "--model",
    required=True,
    metavar="NAME",
    callback=_plain_name,
    help=f"{', '.join(MODELS)}, or a name of your own.",
)
@click.option(
    "--checkpoint",
    required=True,
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="A checkpoint folder in diffusers layout.",
)
@click.option("--frames", type=int, help="Video frames: 8k or 8k + 1. Default: the model's.")
@click.option("--height", type=int, help="Pixels. Default: the model's.")
@click.option("--width", type=int, help="Pixels. Default: the model's.")
@click.option(
    "--precision",
    type=click.Choice(["fp32", "fp16", "bf16"]),
    default="fp32",
    show_default=True,
    help="What the networks compute in. The CPU engine has no bf16.",
)
@click.option("--copy-weights", is_flag=True, help="Put the weights into the bundle instead of pointing at them.")
@click.option("--output", type=click.Path(path_type=Path), metavar="DIR", help="Default: NAME in the engines folder.")
@_ENGINES_DIR
@_reporting
def export(model: str, output: Path | None, engines_dir: Path, progress: Progress, **options: Any) -> Result:
    """Trace a checkpoint's networks into ONNX and write a bundle.

    The weights stay where they are, unless --copy-weights: the bundle points at them and knows their hashes.

    \b
    Example:
      cvx-deploy export --model 5b --checkpoint checkpoints/CogVideoX-5b --frames 25
    """
    _need_export_extra()
    from cvx_deploy.exporters.export import ExportRequest, bundle_from_checkpoint

    bundle = bundle_from_checkpoint(ExportRequest(model=model, **options), output or engines_dir / model, progress)
    networks = {name: network.file.size for name, network in bundle.manifest.networks.items()}
    manifest = bundle.manifest
    values = {
        "bundle": str(bundle.path),
        "model": model,
        "shape": str(manifest.shape),
        "precision": manifest.precision,
        "networks": networks,
    }
    return values, str(bundle.path)


@cli.command()
@_which_bundle
@click.option("--prompt", "prompts", multiple=True, metavar="TEXT", help="What to show; give it again for more videos.")
@click.option("--negative-prompt", default="", metavar="TEXT", help="What to keep away from.")
@click.option("--image", type=click.Path(path_type=Path), metavar="FILE", help="First frame, for image-to-video.")
@click.option("--video", type=click.Path(path_type=Path), metavar="FILE|DIR", help="A clip or frames to start from.")
@click.option("--strength", type=float, default=0.8, show_default=True, help="How much of --video is remade, up to 1.")
@click.option("--steps", type=int, default=50, show_default=True, help="Denoising steps.")
@click.option("--guidance-scale", type=float, default=6.0, show_default=True, help="1 turns guidance off.")
@click.option("--dynamic-cfg", is_flag=True, help="Vary the guidance scale over the steps.")
@click.option("--scheduler", type=click.Choice(["ddim", "dpm"]), help="Default: the checkpoint's own.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the first video; the next has one more.")
@click.option("--num-videos", type=int, default=1, show_default=True, help="Videos a prompt.")
@click.option("--vae-tiling", is_flag=True, help="Decode tile by tile: less memory, slightly other pixels.")
@click.option("--save-latents", type=click.Path(path_type=Path), metavar="FILE.npy", help="Keep the finished latents.")
@click.option("--from-latents", type=click.Path(path_type=Path), metavar="FILE.npy", help="Only decode these latents.")
@click.option(
    "--engine", type=click.Choice(["onnxruntime"]), default="onnxruntime", show_default=True, help="What runs it."
)
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads. Default: one a core.")
@click.option(
    "--checkpoint", type=click.Path(path_type=Path), metavar="DIR", help="Where the bundle's weights have moved to."
)
@click.option(
    "--output",
    default="video.mp4",
    show_default=True,
    metavar="FILE|DIR/",
    help="A .mp4, .webm, .gif or .npy file, or a folder for PNG frames.",
)
@_reporting
def run(
    path: Path,
    engine: str,
    threads: int | None,
    checkpoint: Path | None,
    output: str,
    progress: Progress,
    **options: Any,
) -> Result:
    """Make videos from prompts, and from an image or a video where the model takes one.

    \b
    Examples:
      cvx-deploy run --model 5b --prompt "a panda plays guitar" --output panda.mp4
      cvx-deploy run --model 5b-i2v --image panda.png --prompt "the panda waves" --seed 7
    """
    from cvx_deploy.bundle import Bundle
    from cvx_deploy.runtime.ort import OrtBackend
    from cvx_deploy.runtime.pipeline import RunRequest
    from cvx_deploy.runtime.pipeline import run as run_pipeline

    request = RunRequest(output=output, **options)
    bundle = Bundle.open(path)
    if checkpoint is not None:
        bundle = bundle.with_checkpoint(checkpoint)
    report = run_pipeline(OrtBackend(bundle, threads, progress), request, progress)
    progress.note(_time_table(report.stages))
    values = {
        "videos": [str(video) for video in report.paths],
        "seeds": report.seeds,
        "seconds": {stage: round(seconds, 4) for stage, seconds in report.stages.items()},
        "engine": engine,
        "bundle": str(path),
    }
    return values, "\n".join(str(video) for video in report.paths)


@cli.command()
@_which_bundle
@_reporting
def inspect(path: Path, progress: Progress) -> Result:
    """Say what a bundle holds, after checking its files.

    \b
    Example:
      cvx-deploy inspect --model 5b --json
    """
    from dataclasses import asdict

    from cvx_deploy.bundle import Bundle
    from cvx_deploy.inspect import describe

    bundle = Bundle.open(path)
    for name in bundle.manifest.weights:
        bundle.weight_path(name, progress)
    return {"bundle": str(path), **asdict(bundle.manifest)}, describe(bundle)


@cli.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the completion script of a shell.

    \b
    Example:
      cvx-deploy completion bash >> ~/.bashrc
    """
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(cli, {}, "cvx-deploy", "_CVX_DEPLOY_COMPLETE").source())


def _need_export_extra() -> None:
    """Say what to install when the packages that export are not there."""
    from importlib.util import find_spec

    missing = [name for name in ("torch", "diffusers", "transformers", "optimum", "onnx_ir") if find_spec(name) is None]
    if missing:
        raise CvxError(
            f"this command needs {', '.join(missing)}, which the runtime does without",
            fix='pip install "cvx-deploy[export]"',
        )


def _time_table(stages: dict[str, float]) -> str:
    width = max(map(len, (*stages, "total")))
    rows = [*stages.items(), ("total", sum(stages.values()))]
    return "\n".join(f"{name:<{width}}  {seconds:8.2f} s" for name, seconds in rows)
