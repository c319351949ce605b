"""What commands share: results and progress, options that name a bundle or a size, checks before the work."""

import functools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from cvx_deploy.bounds import (
    HIGHEST_SEED,
    LARGEST_FACTOR,
    LONGEST_SIDE,
    LOWEST_SEED,
    MOST_FRAMES,
    MOST_STEPS,
    MOST_THREADS,
)
from cvx_deploy.cli.entry import drop_stdout, error_line
from cvx_deploy.engines.auto import AUTO, CHOICES
from cvx_deploy.engines.registry import ENGINES
from cvx_deploy.errors import CvxError
from cvx_deploy.install import pip_install
from cvx_deploy.miniatures import MINIATURES, bundle_folder
from cvx_deploy.progress import Progress, RichProgress, SilentProgress
from cvx_deploy.shape import Shape
from cvx_deploy.terminal import safe_lines

if TYPE_CHECKING:
    from cvx_deploy.bundle.opened import Bundle
    from cvx_deploy.parity.verify import Verification

Result = tuple[dict[str, Any], str]
"""What a command returns: the JSON object, and the text that says the same to a person."""

Command = Callable[..., Any]
STEPS = click.IntRange(1, MOST_STEPS)
SEED = click.IntRange(LOWEST_SEED, HIGHEST_SEED)
_SIDE = click.IntRange(max=LONGEST_SIDE)

_MAKING = {
    "batch",
    "run",
    "export",
    "convert",
    "synth",
    "build",
    "refit",
    "quantize",
    "calibrate_cache",
    "bench",
    "pack",
    "unpack",
    "triton",
}
"""The commands whose result lies in files, and on stdout is told of only."""


def reporting(function: Callable[..., Result]) -> Command:
    """Give a command ``--json`` and ``--quiet``, hand it a `Progress`, and print what it returns."""

    @click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
    @click.option("--quiet", "-q", is_flag=True, help="Show no progress bars and no notes.")
    @functools.wraps(function)
    def command(*, as_json: bool, quiet: bool, **options: Any) -> None:
        progress: Progress = SilentProgress() if quiet else RichProgress()
        values, text = function(progress=progress, **options)
        _print(json.dumps(values, indent=2) if as_json else safe_lines(text), function.__name__)
        if "error" in values:  # what was found is printed all the same
            error = values["error"]
            click.echo(error_line(error["what"], error["fix"]), err=True)
            raise click.exceptions.Exit(1)

    return command


def _print(text: str, command: str) -> None:
    """Print a result; where it cannot be, a command that has made something has done its work all the same."""
    try:
        click.echo(text)
    except OSError as error:
        if command not in _MAKING or isinstance(error, BrokenPipeError):
            raise
        drop_stdout()
        click.echo(f"note: all is done, but stdout cannot be written: {error.strerror}", err=True)


def plain_name(_: click.Context, __: click.Parameter, name: str | None) -> str | None:
    """Refuse a bundle's name that would lead out of the engines folder."""
    if name is not None and not re.fullmatch(r"\w[\w.-]*", name):
        raise click.BadParameter(f"{name!r} is not a plain name (letters, digits, '.', '_' and '-')")
    return name


def precision_text(_: click.Context, __: click.Parameter, text: str) -> str:
    """Refuse a precision that makes no sense."""
    from cvx_deploy.errors import RecipeError
    from cvx_deploy.quantize.recipe import Recipe

    try:
        Recipe.parse(text, "bf16")
    except RecipeError as error:
        raise click.BadParameter(str(error).removesuffix(".")) from error
    return text


def shape_of(text: str) -> Shape:
    """Return the shape that a word such as 49x480x720 names."""
    try:
        return Shape.parse(text)
    except ValueError as error:
        what = f"{text!r} is not frames x height x width, such as 49x480x720, of sensible sizes"
        raise click.BadParameter(what) from error


def scaled_file(text: str) -> tuple[Path, float]:
    """Return the path and the scale that a word such as style.safetensors:0.8 names."""
    name, colon, scale = text.rpartition(":")
    if not colon or Path(text).exists():
        return Path(text), 1.0
    try:
        value = float(scale)
    except ValueError:
        return Path(text), 1.0
    if not name or not abs(value) <= LARGEST_FACTOR:  # a NaN fails this too
        raise click.BadParameter(f"{text!r} is not a file and a scale, such as style.safetensors:0.8")
    return Path(name), value


def sizes(shape: str, default: str, *, several: bool) -> Callable[[Command], Command]:
    """Give a command ``--shape``, and the three options that say the same; both at once are refused."""

    def decorate(command: Command) -> Command:
        @click.option("--shape", type=shape_of, multiple=several, metavar="FxHxW", help=shape)
        @click.option(
            "--frames", type=click.IntRange(max=MOST_FRAMES), help=f"Video frames: 8k or 8k + 1. Default: {default}."
        )
        @click.option("--height", type=_SIDE, help=f"Pixels. Default: {default}.")
        @click.option("--width", type=_SIDE, help=f"Pixels. Default: {default}.")
        @functools.wraps(command)
        def sized(**options: Any) -> Any:
            if options["shape"] and any(options[axis] is not None for axis in ("frames", "height", "width")):
                raise click.UsageError("give --shape, or --frames, --height and --width")
            return command(**options)

        return sized

    return decorate


def which_bundle(command: Command) -> Command:
    """Give a command the options that name a bundle, as one argument ``path``; `run` and `bench` do without them."""
    help_of_model = f"The bundle of that name in the engines folder; {' and '.join(MINIATURES)} are always there."

    @click.option("--model", metavar="NAME", callback=plain_name, help=help_of_model)
    @click.option("--bundle", type=click.Path(path_type=Path), metavar="DIR", help="The folder of a bundle, anywhere.")
    @ENGINES_DIR
    @functools.wraps(command)
    def named(*, model: str | None, bundle: Path | None, engines_dir: Path, **options: Any) -> Any:
        if model is None and bundle is None and "image" in options:
            model = "mini" if options["image"] is None else "mini-i2v"
        if (model is None) == (bundle is None):
            raise click.UsageError("name a bundle with --model NAME or --bundle DIR")
        return command(path=bundle or bundle_folder(str(model), engines_dir), **options)

    return named


ENGINES_DIR = click.option(
    "--engines-dir",
    type=click.Path(path_type=Path),
    default="engines",
    envvar="CVX_ENGINES_DIR",
    show_default=True,
    show_envvar=True,
    help="The folder that holds bundles by their names.",
)


def ray_address_of(_: click.Context, __: click.Parameter, address: str | None) -> str | None:
    """Refuse what is no address of a Ray cluster."""
    if (
        address is not None
        and address != "here"
        and not re.fullmatch(r"[\w.-]+:\d{1,5}|\[[\da-fA-F:]+\]:\d{1,5}", address)
    ):
        raise click.BadParameter(f"{address!r} is not the HOST:PORT of a cluster's head, such as 10.0.0.1:6379")
    return address


RAY = click.option(
    "--ray",
    "ray_address",
    is_flag=False,
    flag_value="here",
    callback=ray_address_of,
    metavar="[HOST:PORT]",
    help="Work through Ray, on all nodes of this cluster; without an address on one that ends with this command.",
)


MOVED_CHECKPOINT = click.option(
    "--checkpoint",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Where the bundle's weights lie now, if they have moved.",
)


REVISION = click.option("--revision", metavar="REV", help="A branch, tag or commit of a hub's repository.")
VARIANT = click.option("--variant", metavar="NAME", help="Which weight files, such as fp16 for *.fp16.safetensors.")
OFFLINE = click.option("--offline", is_flag=True, help="Use what has been fetched before, and no network.")
CHECKPOINT_FORMS = "A folder in diffusers layout, a Hugging Face id, or modelscope://ID."
SOURCE = click.option(
    "--checkpoint", metavar="DIR|ID", help=f"{CHECKPOINT_FORMS} Default: the model's Hugging Face id."
)


def reference(command: Command) -> Command:
    """Give a command the options that name the checkpoint a bundle is held against, as one argument ``reference``."""

    @click.option(
        "--checkpoint",
        metavar="DIR|ID",
        help=f"What to hold it against. {CHECKPOINT_FORMS} Default: what it was exported from.",
    )
    @REVISION
    @OFFLINE
    @functools.wraps(command)
    def held(*, checkpoint: str | None, revision: str | None, offline: bool, **options: Any) -> Any:
        from cvx_deploy.exporters.reference.checkpoint import Reference

        return command(reference=Reference(checkpoint, revision, offline), **options)

    return held


def open_bundle(path: Path, checkpoint: Path | None) -> "Bundle":
    """Open a bundle whose weights may have moved, as `MOVED_CHECKPOINT` says."""
    from cvx_deploy.bundle.opened import Bundle

    bundle = Bundle.open(path)
    return bundle if checkpoint is None else bundle.with_checkpoint(checkpoint)


def verdict_values(found: "Verification", bundle: "Bundle") -> dict[str, Any]:
    """Return what was found out about a bundle as plain values, and as a failure where it is not sound."""
    values = found.as_dict()
    if found.unsound:
        what = f"{bundle.path} is not sound: see {', '.join(found.unsound)}"
        values["error"] = {"type": "BundleError", "what": what, "fix": bundle.remedy}
    return values


LORAS = click.option(
    "--lora",
    "loras",
    type=scaled_file,
    multiple=True,
    metavar="FILE[:SCALE]",
    help="An adapter to merge into the transformer; again for more. SCALE is 1 unless given.",
)


def need_export_extra(*packages: str) -> None:
    """Say what to install when `packages`, or those that export, are not there."""
    need_extra("export", *(packages or ("torch", "diffusers", "transformers", "optimum", "onnx_ir")))


def need_extra(extra: str, *packages: str) -> None:
    """Say which extra to install when one of its packages is not there."""
    from importlib.util import find_spec

    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise CvxError(
            f"this command needs {', '.join(missing)}, which the runtime does without",
            fix=pip_install(extra),
        )


IMAGE = click.option(
    "--image", type=click.Path(path_type=Path), metavar="FILE", help="First frame, for image-to-video."
)
NUM_PROMPTS = click.option("--num-prompts", type=int, metavar="N", help="Use only the first N prompts. Default: all.")


def bytes_of(text: str) -> int:
    """Return the bytes that 12GB, 800MB or 16GiB means."""
    found = re.fullmatch(r"(\d{1,15}(?:\.\d{1,15})?)\s*([KMGT]?)(i?)B?", text.strip(), re.IGNORECASE | re.ASCII)
    if not found:
        raise click.BadParameter(f"{text!r} is not a size, such as 12GB")
    base = 1024 if found[3] else 1000
    return int(float(found[1]) * base ** " KMGT".index(found[2].upper() or " "))


ENGINE = click.option(
    "--engine",
    type=click.Choice(CHOICES),
    default=AUTO,
    show_default=True,
    help="What runs the networks: auto takes the fastest that can here, and says which. The tensorrt engines need "
    "cvx-deploy build first.",
)
NAMED_ENGINE = click.option(
    "--engine", type=click.Choice(ENGINES), default="onnxruntime", show_default=True, help="What runs the networks."
)
VRAM = click.option(
    "--vram", type=bytes_of, metavar="SIZE", help="GPU memory that a tensorrt engine may use, such as 12GB."
)


def cpu_threads(default: str = "one per core") -> Callable[[Command], Command]:
    """Give a command ``--threads``, and say what holds without it."""
    return click.option(
        "--threads",
        type=click.IntRange(1, MOST_THREADS),
        help=f"CPU threads of onnxruntime or openvino. Default: {default}.",
    )


def given() -> set[str]:
    """Return the options that stand on the command line, with the value that they have anyway, too."""
    context = click.get_current_context()
    return {name for name in context.params if context.get_parameter_source(name) is ParameterSource.COMMANDLINE}
