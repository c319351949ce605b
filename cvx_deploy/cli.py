"""The command line: parse, call one function, print.

Results go to stdout, progress and notes to stderr. With ``--json`` stdout holds one JSON object and nothing else, on
failure too. Exit codes: 0 done, 1 a stated failure, 2 wrong usage, 130 interrupted. Heavy imports happen inside the
commands, so that ``--help`` is instant.
"""

import functools
import json
import math
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
from cvx_deploy.miniatures import MINIATURES, miniature
from cvx_deploy.models import MODELS, Shape
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
        if "error" in values:  # what was found is printed all the same
            error = values["error"]
            click.echo(f"error: {error['what']}. fix: {error['fix']}.", err=True)
            raise click.exceptions.Exit(1)

    return command


def _plain_name(_: click.Context, __: click.Parameter, name: str | None) -> str | None:
    """Refuse a bundle's name that would lead out of the engines folder."""
    if name is not None and not re.fullmatch(r"\w[\w.-]*", name):
        raise click.BadParameter(f"{name!r} is not a plain name (letters, digits, '.', '_' and '-')")
    return name


def _shape(text: str) -> Shape:
    """Return the shape that a word such as 49x480x720 names."""
    try:
        return Shape.parse(text)
    except ValueError as error:
        raise click.BadParameter(f"{text!r} is not frames x height x width, such as 49x480x720") from error


def _scaled(text: str) -> tuple[Path, float]:
    """Return the path and the scale that a word such as style.safetensors:0.8 names."""
    name, colon, scale = text.rpartition(":")
    if not colon or Path(text).exists():
        return Path(text), 1.0
    try:
        value = float(scale)
    except ValueError:
        return Path(text), 1.0
    if not name or not math.isfinite(value):
        raise click.BadParameter(f"{text!r} is not a file and a scale, such as style.safetensors:0.8")
    return Path(name), value


def _sizes(shape: str, default: str, *, several: bool) -> Callable[[Command], Command]:
    """Give a command ``--shape``, and the three options that say the same; both at once are refused."""

    def decorate(command: Command) -> Command:
        @click.option("--shape", type=_shape, multiple=several, metavar="FxHxW", help=shape)
        @click.option("--frames", type=int, help=f"Video frames: 8k or 8k + 1. Default: {default}.")
        @click.option("--height", type=int, help=f"Pixels. Default: {default}.")
        @click.option("--width", type=int, help=f"Pixels. Default: {default}.")
        @functools.wraps(command)
        def sized(**options: Any) -> Any:
            if options["shape"] and any(options[axis] is not None for axis in ("frames", "height", "width")):
                raise click.UsageError("give --shape, or --frames, --height and --width")
            return command(**options)

        return sized

    return decorate


def _which_bundle(command: Command) -> Command:
    """Give a command the options that name a bundle, as one argument ``path``; `run` does without by the miniature."""
    help_of_model = f"The bundle NAME in the engines folder; {' and '.join(MINIATURES)} are always there."

    @click.option("--model", metavar="NAME", callback=_plain_name, help=help_of_model)
    @click.option("--bundle", type=click.Path(path_type=Path), metavar="DIR", help="A bundle anywhere.")
    @_ENGINES_DIR
    @functools.wraps(command)
    def named(*, model: str | None, bundle: Path | None, engines_dir: Path, **options: Any) -> Any:
        if model is None and bundle is None and "prompts" in options:
            model = "mini" if options["image"] is None else "mini-i2v"
        if (model is None) == (bundle is None):
            raise click.UsageError("name a bundle with --model NAME or --bundle DIR")
        return command(path=bundle or _place_of(str(model), engines_dir), **options)

    return named


def _place_of(model: str, engines_dir: Path) -> Path:
    """Return where a model's bundle lies; a miniature that nobody has exported lies in the package."""
    path = engines_dir / model
    return miniature(model) if model in MINIATURES and not path.exists() else path


_ENGINES_DIR = click.option(
    "--engines-dir",
    type=click.Path(path_type=Path),
    default="engines",
    envvar="CVX_ENGINES_DIR",
    show_default=True,
    show_envvar=True,
    help="Where bundles live by their names.",
)


_MOVED_CHECKPOINT = click.option(
    "--checkpoint", type=click.Path(path_type=Path), metavar="DIR", help="Where the bundle's weights have moved to."
)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, package_name="cvx-deploy")
def cli() -> None:
    """Take CogVideoX from a checkpoint to a video without PyTorch at run time.

    \b
    Try it without a download, on a miniature that comes with the package:
      cvx-deploy run --prompt "a red circle moves to the right" --output circle.mp4
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
    metavar="DIR|ID",
    help="A folder in diffusers layout, a Hugging Face id, or modelscope://ID. Default: the model's Hugging Face id.",
)
@click.option("--revision", metavar="REV", help="A branch, tag or commit of a hub's repository.")
@click.option("--variant", metavar="NAME", help="Which weight files, such as fp16 for *.fp16.safetensors.")
@click.option("--offline", is_flag=True, help="Use what has been fetched before, and no network.")
@_sizes("A video size, such as 49x480x720; again for more in the bundle.", "the model's", several=True)
@click.option(
    "--precision",
    type=click.Choice(["fp32", "fp16", "bf16"]),
    default="fp32",
    show_default=True,
    help="What the networks compute in. The CPU engine has no bf16.",
)
@click.option(
    "--transformer",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="A fine-tuned transformer in place of the checkpoint's.",
)
@click.option(
    "--lora",
    "loras",
    type=_scaled,
    multiple=True,
    metavar="FILE[:SCALE]",
    help="An adapter to merge into the transformer; again for more. SCALE is 1 unless given.",
)
@click.option("--copy-weights", is_flag=True, help="Put the weights into the bundle instead of pointing at them.")
@click.option("--output", type=click.Path(path_type=Path), metavar="DIR", help="Default: NAME in the engines folder.")
@_ENGINES_DIR
@_reporting
def export(
    model: str,
    checkpoint: str | None,
    offline: bool,
    shape: tuple[Shape, ...],
    output: Path | None,
    engines_dir: Path,
    progress: Progress,
    **options: Any,
) -> Result:
    """Trace a checkpoint's networks into ONNX and write a bundle.

    The weights stay where they are, unless --copy-weights: the bundle points at them and knows their hashes. Of a hub's
    repository, only the files needed are fetched, into the cache that all programs share.

    \b
    Examples:
      cvx-deploy export --model 5b
      cvx-deploy export --model 5b --checkpoint checkpoints/CogVideoX-5b --frames 25
      cvx-deploy export --model 5b --shape 49x480x720 --shape 25x480x720 --lora style.safetensors:0.8
    """
    if checkpoint is None and model in MINIATURES:
        checkpoint = str(miniature(model))
    if checkpoint is None and model not in MODELS:
        raise click.UsageError(f"{model} is a name of your own: name its checkpoint with --checkpoint")
    _need_export_extra()
    from dataclasses import asdict, replace

    from cvx_deploy.exporters.export import ExportRequest, bundle_from_checkpoint, check_request
    from cvx_deploy.exporters.hub import Source, fetch

    where = checkpoint or MODELS[model].hub_id
    request = ExportRequest(model=model, checkpoint=Path(where), shapes=shape, **options)
    own = request.transformer is not None
    source = Source(where, request.revision, request.variant, offline, own_transformer=own)
    fetched = fetch(source, functools.partial(check_request, request), progress)
    request = replace(request, checkpoint=fetched.folder, source=fetched.source, revision=fetched.revision)
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
    }
    return values, str(bundle.path)


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
@_reporting
def convert(transformer: Path | None, vae: Path | None, checkpoint: Path, output: Path, progress: Progress) -> Result:
    """Make a checkpoint in diffusers layout from the original CogVideo repository's SAT files.

    \b
    Example:
      cvx-deploy convert --transformer sat.pt --checkpoint CogVideoX-5b --output my-5b
    """
    if transformer is None and vae is None:
        raise click.UsageError("name a file with --transformer or --vae")
    _need_export_extra()
    from cvx_deploy.exporters.sat import checkpoint_from_sat

    checkpoint_from_sat(transformer, vae, checkpoint, output, progress)
    size = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
    return {"checkpoint": str(output), "bytes": size}, str(output)


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
@click.option("--contact-sheet", type=click.Path(path_type=Path), metavar="FILE.png", help="Picture some frames, too.")
@_sizes("Which of the bundle's sizes. Default: its first, or what the latents fit.", "any", several=False)
@click.option(
    "--engine", type=click.Choice(["onnxruntime"]), default="onnxruntime", show_default=True, help="What runs it."
)
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads. Default: one a core.")
@_MOVED_CHECKPOINT
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
    shape: Shape | None,
    frames: int | None,
    height: int | None,
    width: int | None,
    output: str,
    progress: Progress,
    **options: Any,
) -> Result:
    """Make videos from prompts, and from an image or a video where the model takes one.

    Without --model and --bundle a miniature makes it that comes with the package: mini, or with an image mini-i2v. It
    knows one shape that moves, and nothing else.

    \b
    Examples:
      cvx-deploy run --prompt "a red circle moves to the right"
      cvx-deploy run --model 5b --prompt "a panda plays guitar" --output panda.mp4
      cvx-deploy run --model 5b-i2v --image panda.png --prompt "the panda waves" --seed 7
    """
    from cvx_deploy.bundle import Bundle
    from cvx_deploy.runtime.ort import OrtBackend
    from cvx_deploy.runtime.pipeline import RunRequest
    from cvx_deploy.runtime.pipeline import run as run_pipeline
    from cvx_deploy.runtime.shapes import Wanted, bundle_at

    request = RunRequest(output=output, **options)
    bundle = Bundle.open(path)
    if checkpoint is not None:
        bundle = bundle.with_checkpoint(checkpoint)
    wanted = Wanted(shape.frames, shape.height, shape.width) if shape else Wanted(frames, height, width)
    bundle = bundle_at(bundle, wanted, request.from_latents)
    report = run_pipeline(OrtBackend(bundle, threads, progress), request, progress)
    progress.note(_time_table(report.stages))
    values = {
        "videos": [str(video) for video in report.paths],
        "seeds": report.seeds,
        "seconds": {stage: round(seconds, 4) for stage, seconds in report.stages.items()},
        "shape": str(bundle.shape),
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
@_which_bundle
@_MOVED_CHECKPOINT
@click.option("--load", is_flag=True, help="Load every network in ONNX Runtime as well: needs memory for the weights.")
@click.option("--quick", is_flag=True, help="Hash no weight file whose size and time stamp are as they were.")
@_reporting
def verify(path: Path, checkpoint: Path | None, load: bool, quick: bool, progress: Progress) -> Result:
    """Check every hash, every weight's place in its file, and every graph, and list all that is wrong.

    \b
    Examples:
      cvx-deploy verify --model 5b
      cvx-deploy verify --bundle engines/5b --load --json
    """
    _need_export_extra("onnx")
    from cvx_deploy.bundle import Bundle
    from cvx_deploy.verify import verify as verify_bundle

    bundle = Bundle.read(path)
    moved = bundle.with_checkpoint(checkpoint) if checkpoint else bundle
    found = verify_bundle(moved, progress, load=load, quick=quick)
    values = found.as_dict()
    if found.unsound:
        what = f"{path} is not sound: see {', '.join(found.unsound)}"
        values["error"] = {"type": "BundleError", "what": what, "fix": bundle.remedy}
    return values, str(found)


@cli.command()
@_which_bundle
@_MOVED_CHECKPOINT
@click.option("--output", required=True, type=click.Path(path_type=Path), metavar="FILE.cvx", help="The file to write.")
@_reporting
def pack(path: Path, checkpoint: Path | None, output: Path, progress: Progress) -> Result:
    """Write a bundle with all its weights, those in the checkpoint too, into one file.

    It is a plain tar, which unpack takes back.

    \b
    Example:
      cvx-deploy pack --model 5b --output 5b.cvx
    """
    from cvx_deploy.bundle import Bundle
    from cvx_deploy.pack import pack as pack_bundle

    size = pack_bundle(Bundle.open(path), output, progress, checkpoint)
    return {"bundle": str(path), "file": str(output), "bytes": size}, str(output)


@cli.command()
@click.argument("file", type=click.Path(path_type=Path), metavar="FILE.cvx")
@click.option("--model", metavar="NAME", callback=_plain_name, help="Unpack to NAME in the engines folder.")
@click.option("--output", type=click.Path(path_type=Path), metavar="DIR", help="Unpack to a folder anywhere.")
@_ENGINES_DIR
@_reporting
def unpack(file: Path, model: str | None, output: Path | None, engines_dir: Path, progress: Progress) -> Result:
    """Make a bundle of a packed one, and check every file while it is written.

    \b
    Example:
      cvx-deploy unpack 5b.cvx --model 5b
    """
    if (model is None) == (output is None):
        raise click.UsageError("say where to with --model NAME or --output DIR")
    from cvx_deploy.pack import unpack as unpack_bundle

    bundle = unpack_bundle(file, output or engines_dir / str(model), progress)
    return {"bundle": str(bundle.path), "file": str(file), "model": bundle.manifest.model}, str(bundle.path)


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


def _need_export_extra(*packages: str) -> None:
    """Say what to install when `packages`, or those that export, are not there."""
    from importlib.util import find_spec

    needed = packages or ("torch", "diffusers", "transformers", "optimum", "onnx_ir")
    missing = [name for name in needed if find_spec(name) is None]
    if missing:
        raise CvxError(
            f"this command needs {', '.join(missing)}, which the runtime does without",
            fix='pip install "cvx-deploy[export]"',
        )


def _time_table(stages: dict[str, float]) -> str:
    width = max(map(len, (*stages, "total")))
    rows = [*stages.items(), ("total", sum(stages.values()))]
    return "\n".join(f"{name:<{width}}  {seconds:8.2f} s" for name, seconds in rows)
