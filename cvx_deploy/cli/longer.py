"""What `run` does for a video longer than the bundle's: its options, the choice of the way, and chains."""

import functools
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from cvx_deploy.bounds import MOST_FRAMES
from cvx_deploy.cli.options import Command, Result, plain_name
from cvx_deploy.errors import CvxError, PromptError
from cvx_deploy.miniatures import bundle_folder
from cvx_deploy.progress import Progress
from cvx_deploy.shape import Shape
from cvx_deploy.terminal import LONGEST_PATH, safe

if TYPE_CHECKING:
    from cvx_deploy.bundle.opened import Bundle
    from cvx_deploy.longer.chain import Chain
    from cvx_deploy.longer.write import LongReport
    from cvx_deploy.pipeline.pipeline import Pipeline

Way = Literal["chain", "windows"]
Opener = Callable[["Bundle"], "Pipeline"]
"""Opens a bundle, of which the networks of one phase are held: a chain then takes the memory of one clip."""


@dataclass(frozen=True)
class Long:
    """The options of a long video, as they stand on the command line."""

    way: Way | None = None
    seconds: float | None = None
    overlap: int | None = None
    script: Path | None = None
    image_model: str | None = None
    free_colours: bool = False

    def frames(self, frames: int | None, fps: int) -> int | None:
        """Return how long the video is to be; None where it is not said."""
        if self.seconds is None:
            return frames
        if frames is not None:
            raise click.UsageError("give --seconds, or --frames or --shape")
        count = round(self.seconds * fps)
        if not 0 < count <= MOST_FRAMES:
            raise CvxError(
                f"{self.seconds:g} s at {fps} frames a second are {count} frames",
                fix=f"use --seconds from {1 / fps:g} to {MOST_FRAMES / fps:g}",
            )
        return count


def long_options(command: Command) -> Command:
    """Give a command the options of a long video, as one argument ``long``."""

    @click.option("--seconds", type=click.FloatRange(0, min_open=True), help="How long the video is to be.")
    @click.option(
        "--long",
        "way",
        type=click.Choice(["chain", "windows"]),
        help="How a video beyond the bundle's frames is made: by clips, each of which goes on from the one before, or "
        "by overlapping windows. Default: chain where there is an image-to-video bundle, else windows.",
    )
    @click.option("--overlap", type=int, help="Frames that clips, or windows, share. Default: 1, half of a window.")
    @click.option(
        "--script",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="What is shown from when on, in a chain: lines such as: 4.5 a red circle moves to the left",
    )
    @click.option(
        "--image-model",
        callback=plain_name,
        metavar="NAME",
        help="The image-to-video bundle, beside this one, that makes a chain's clips after the first. "
        "Default: this one, or its name with -i2v.",
    )
    @click.option(
        "--free-colours", is_flag=True, help="Let brightness and colour of a chain move away from its first clip's."
    )
    @functools.wraps(command)
    def given(
        *,
        way: Way | None,
        seconds: float | None,
        overlap: int | None,
        script: Path | None,
        image_model: str | None,
        free_colours: bool,
        **options: Any,
    ) -> Any:
        return command(long=Long(way, seconds, overlap, script, image_model, free_colours), **options)

    return given


def way_of(
    long: Long, bundle: "Bundle", frames: int | None, height: int | None, width: int | None, *, windows: bool
) -> Way | None:
    """Return how a video is made; None where nothing says that a chain or windows make it.

    Args:
        long: What is asked for.
        bundle: What makes it, or the first clip of it.
        frames: How many are asked for, if it is said.
        height: In pixels, if it is said; `width` likewise.
        windows: Whether there is an option that is of windows alone.

    Raises:
        PromptError: An option means nothing for that way.
    """
    longest = max((shape.frames for shape in _shapes(bundle, height, width)), default=0)
    beyond = frames is not None and frames > longest
    way = long.way or ("windows" if windows or not longest else None)
    if way is None and (long.script is not None or long.seconds is not None or beyond):
        at_hand = image_bundle(long, bundle) is not None
        way = "chain" if at_hand or long.script is not None or not beyond else "windows"
    if way == "chain" and windows:
        raise PromptError(
            "--loop, --freenoise and --windows-at-once are of windows", fix="leave them out, or use --long windows"
        )
    for name, word in (("script", "--script"), ("image_model", "--image-model"), ("free_colours", "--free-colours")):
        if way != "chain" and getattr(long, name):
            raise PromptError(f"{word} is of a chain of clips", fix=f"add --long chain, or leave {word} out")
    return way


def image_bundle(long: Long, bundle: "Bundle") -> Path | None:
    """Return where the image-to-video bundle lies that makes the clips after the first; None where there is none."""
    if long.image_model is None and bundle.manifest.traits.task == "image-to-video":
        return bundle.path
    name = long.image_model or f"{bundle.path.name}-i2v"
    path = bundle_folder(name, bundle.path.parent)
    return path if long.image_model is not None or (path / "bundle.json").is_file() else None


def chain_result(
    long: Long,
    bundle: "Bundle",
    open_pipeline: Opener,
    frames: int | None,
    shape: tuple[int | None, int | None],
    options: dict[str, Any],
    progress: Progress,
) -> Result:
    """Make a video by chaining, and return what `run` prints of it.

    Args:
        long: What is asked for.
        bundle: What makes the first clip.
        open_pipeline: Opens it, and the one that follows.
        frames: Of the whole video; None for a clip a prompt.
        shape: Height and width, where they are said.
        options: Of `run`, by the names of `RunRequest`.
        progress: Told what goes on.
    """
    from cvx_deploy.longer.write import LongRequest, write_long

    _check(long, options)
    with ExitStack() as stack:
        chain = _chain(long, bundle, open_pipeline, frames, shape, stack)
        overlap = 1 if long.overlap is None else long.overlap
        lengths = chain.lengths(overlap)
        prompts = tuple(options["prompts"])
        if frames is None:
            frames = lengths.first + (max(len(prompts), 1) - 1) * (lengths.then - overlap)
        if long.script is not None:
            from cvx_deploy.longer.script import Script

            fps = chain.first.bundle.manifest.fps
            prompts = Script.read(long.script).prompts(lengths.starts(frames), frames, fps)
        if not prompts:
            raise PromptError("there is no prompt", fix="give at least one with --prompt TEXT")
        request = LongRequest(
            prompts,
            frames,
            options["output"],
            seed=options["seed"],
            overlap=overlap,
            hold_colours=not long.free_colours,
            fps=options["fps"],
            contact_sheet=options["contact_sheet"],
            how=_how(options),
        )
        return _values(chain, request.frames, write_long(chain, request, progress))


_OF_A_CLIP = (
    *("negative_prompt", "image", "video", "strength", "steps", "guidance_scale", "dynamic_cfg", "scheduler"),
    *("vae_tiling", "latents_dtype", "cache", "cache_speedup", "cache_tolerance", "fast"),
)
_WORDS = {"steps": "num_inference_steps", "dynamic_cfg": "use_dynamic_cfg"}


def _how(options: dict[str, Any]) -> dict[str, Any]:
    """Return the words of `Pipeline.stream` for every clip."""
    said = {name: options[name] for name in _OF_A_CLIP}
    return {_WORDS.get(name, name): value for name, value in said.items() if value is not None and value is not False}


def _check(long: Long, options: dict[str, Any]) -> None:
    """Refuse what a chain cannot have."""
    for name, flag in (("save_latents", "--save-latents"), ("from_latents", "--from-latents")):
        if options[name] is not None:
            raise CvxError(f"{flag} is of one clip, and a chain has several", fix=f"leave {flag} out")
    if options["num_videos"] != 1:
        raise CvxError(f"{options['num_videos']} chains at once", fix="leave --num-videos out, and run it once a seed")
    if long.script is not None and options["prompts"]:
        raise PromptError("--prompt beside --script means nothing", fix="leave --prompt out")


def _chain(
    long: Long,
    bundle: "Bundle",
    open_pipeline: Opener,
    frames: int | None,
    shape: tuple[int | None, int | None],
    stack: ExitStack,
) -> "Chain":
    """Open what a chain is made with, at the size that is asked for."""
    from cvx_deploy.bundle.opened import Bundle
    from cvx_deploy.longer.chain import Chain
    from cvx_deploy.pipeline.shapes import ShapeChoice, bundle_at

    fitting = _shapes(bundle, *shape)
    if not fitting:
        bundle_at(bundle, ShapeChoice(None, *shape))  # says what there is
    first = bundle.at(_clip_shape(fitting, frames))
    alone = frames is not None and frames <= first.shape.frames
    place = image_bundle(long, bundle)
    if place is None and not alone:
        name = f"{bundle.path.name}-i2v"
        raise PromptError(
            f"{bundle.path} cannot go on from a clip, and there is no image-to-video bundle {name} beside it",
            fix="export one of the same size, and name it with --image-model; or use --long windows",
        )
    one = stack.enter_context(open_pipeline(first))
    if alone or place is None:
        return Chain(one, None)
    if place == bundle.path:
        return Chain(one, one)
    then = Bundle.open(place)
    size = _shapes(then, first.shape.height, first.shape.width)
    if size:
        then = then.at(_clip_shape(size, None))
    return Chain(one, stack.enter_context(open_pipeline(then)))


def _shapes(bundle: "Bundle", height: int | None, width: int | None) -> list[Shape]:
    """Return the shapes of a bundle of a size, or of the size of its first."""
    sides = bundle.shape.height if height is None else height, bundle.shape.width if width is None else width
    return [shape for shape in bundle.shapes if (shape.height, shape.width) == sides]


def _clip_shape(shapes: list[Shape], frames: int | None) -> Shape:
    """Return the shortest that holds so many frames, or the longest."""
    enough = [shape for shape in shapes if frames is not None and shape.frames >= frames]
    return min(enough, key=lambda shape: shape.frames) if enough else max(shapes, key=lambda shape: shape.frames)


def _values(chain: "Chain", frames: int, report: "LongReport") -> Result:
    bundle = chain.first.bundle
    clips = [
        {**asdict(clip), "seconds": None if seconds is None else round(seconds, 4)}
        for clip, seconds in zip(report.clips, report.seconds, strict=True)
    ]
    values = {
        "videos": [str(video) for video in report.paths],
        "long": "chain",
        "seeds": [clip.seed for clip in report.clips],
        "clips": clips,
        "frames": frames + len(report.interpolated),
        "fps": report.fps,
        "interpolated": report.interpolated,
        "shape": str(bundle.shape),
        "engine": chain.first.engine,
        "precision": bundle.manifest.precision,
        "bundle": str(bundle.path),
        "image_bundle": None if chain.then is None else str(chain.then.bundle.path),
    }
    return values, "\n".join(safe(video, LONGEST_PATH) for video in report.paths)
