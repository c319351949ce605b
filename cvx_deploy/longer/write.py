"""A long video into a file: clip by clip as they come, at another rate where one is asked for, and gone on with."""

import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cvx_deploy.longer.chain import Chain, ClipMade
from cvx_deploy.longer.parts import Parts, mark_of
from cvx_deploy.longer.plan import Clip
from cvx_deploy.media.encoders import VideoFormat
from cvx_deploy.media.film import Film
from cvx_deploy.media.interpolation import check_rate
from cvx_deploy.media.write import check_file_place, check_writable
from cvx_deploy.pipeline.events import Event, Frames
from cvx_deploy.progress import Progress, SilentProgress


@dataclass(frozen=True)
class LongRequest:
    """A long video, and where it goes.

    Attributes:
        prompts: One, or one a clip.
        frames: How many the models make; with a higher `fps` the file has more.
        output: See `RunRequest`.
        seed: Of the first clip; each that follows has one more.
        overlap: How many frames a clip shares with the one before.
        hold_colours: Whether brightness and colour are held at those of the first clip.
        fps: Frames a second of the file; None for the models' own.
        contact_sheet: Where to put a picture of some frames.
        how: The words of `Pipeline.stream` for every clip; image, video and strength for the first.
    """

    prompts: tuple[str, ...]
    frames: int
    output: Path | str
    seed: int = 0
    overlap: int = 1
    hold_colours: bool = True
    fps: int | None = None
    contact_sheet: Path | None = None
    how: dict[str, Any] = field(default_factory=dict)


@dataclass
class LongReport:
    """What was made.

    Attributes:
        clips: Of which it is.
        seconds: How long each clip took; None for one that an earlier run had made.
        paths: The video.
        fps: Frames a second of the file.
        interpolated: The numbers of its frames that no model made.
    """

    clips: tuple[Clip, ...]
    seconds: list[float | None] = field(default_factory=list)
    paths: list[Path] = field(default_factory=list)
    fps: int = 0
    interpolated: list[int] = field(default_factory=list)


def write_long(
    chain: Chain,
    request: LongRequest,
    progress: Progress | None = None,
    watch: Callable[[Event], None] = lambda _: None,
) -> LongReport:
    """Make a long video by chaining, and write it.

    Where an earlier run of the same request was cut off, it goes on after the last clip that is whole, and the file is
    that of an undisturbed run.

    Raises:
        CvxError: Of every kind, before any long work where it can be known then.
    """
    progress = progress or SilentProgress()
    made = chain.first.bundle.manifest.fps
    check_rate(made, request.fps)
    clips = chain.clips(request.prompts, request.frames, seed=request.seed, overlap=request.overlap)
    check_writable(request.output)
    if request.contact_sheet is not None:
        check_file_place(request.contact_sheet)
    parts = Parts(request.output, _mark(chain, request))
    kept = parts.kept(len(clips) - 1)
    if kept:
        progress.note(f"note: {len(kept)} of {len(clips)} clips are there already, from a run that was cut off")
    report = LongReport(clips, [None] * len(kept))
    shape = chain.first.bundle.shape
    form = VideoFormat(request.frames, shape.height, shape.width, made)
    with Film(request.output, form, request.fps, request.contact_sheet) as film:
        _fill(film, report, chain, request, kept, parts, progress, watch)
    report.paths, report.fps, report.interpolated = list(film.paths), film.form.fps, film.interpolated
    parts.remove()
    return report


def _fill(
    film: Film,
    report: LongReport,
    chain: Chain,
    request: LongRequest,
    kept: list[NDArray[np.uint8]],
    parts: Parts,
    progress: Progress,
    watch: Callable[[Event], None],
) -> None:
    clips, begun = report.clips, time.monotonic()
    happening = chain.stream(
        request.prompts,
        num_frames=request.frames,
        seed=request.seed,
        overlap=request.overlap,
        hold_colours=request.hold_colours,
        kept=kept,
        **request.how,
    )
    with closing(happening), progress.task("clips", len(clips)) as advance:
        advance(len(kept))
        for event in happening:
            if isinstance(event, ClipMade):
                parts.keep(event.clip.index, event.pixels)
                report.seconds.append(time.monotonic() - begun)
                begun = time.monotonic()
                progress.note(_said(event.clip, len(clips)))
                advance(1)
                continue
            watch(event)
            if isinstance(event, Frames):
                film.add(event.frames)
    if len(report.seconds) < len(clips):  # a single one is not kept
        report.seconds.append(time.monotonic() - begun)


def _said(clip: Clip, count: int) -> str:
    frames = f"frames {clip.start + 1} to {clip.start + clip.frames}"
    return f"clip {clip.index + 1} of {count}: {frames}, seed {clip.seed}, {clip.prompt}"


def _mark(chain: Chain, request: LongRequest) -> str:
    asked = {
        "prompts": request.prompts,
        "frames": request.frames,
        "seed": request.seed,
        "overlap": request.overlap,
        "hold_colours": request.hold_colours,
        "how": request.how,
    }
    return mark_of([one.identity for one in (chain.first, chain.then) if one is not None], asked)
