"""The prompts of a batch: a file of JSON lines, checked whole before the first video is made."""

import hashlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np

from cvx_deploy.bundle.opened import Bundle
from cvx_deploy.errors import CvxError, MediaError, PromptError, ShapeError
from cvx_deploy.pipeline.request import RunRequest
from cvx_deploy.pipeline.run import check_schedule, check_task
from cvx_deploy.pipeline.shapes import ShapeChoice, bundle_at
from cvx_deploy.reading import read_whole
from cvx_deploy.shape import Shape
from cvx_deploy.terminal import safe

_MOST_BYTES = 1 << 30
_MOST_TOLD = 20
_PLAIN = re.compile(r"\w[\w.-]{0,99}")


class Line(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What one video is to be; the words are those of `Pipeline.stream`.

    Attributes:
        id: What its file is named after.
        image: The first frame, and `video` the clip, that it starts from: a path, from the folder of the batch's file.
    """

    prompt: str
    id: str | None = None
    seed: int | None = None
    negative_prompt: str = ""
    num_frames: int | None = None
    height: int | None = None
    width: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    image: str | None = None
    video: str | None = None
    strength: float | None = None
    cache: Literal["fixed", "adaptive"] | None = None


class Task(msgspec.Struct, frozen=True):
    """A video to be made, complete.

    Attributes:
        line: With `id` and `seed` filled in, and whole paths.
        digest: Of it, its sources, the bundle and the engine.
        shape: Which of the bundle's.
        fps: Of its file.
    """

    line: Line
    digest: str
    shape: Shape
    fps: int

    @property
    def id(self) -> str:
        """What its file is named after."""
        assert self.line.id is not None
        return self.line.id

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of `Pipeline.stream`."""
        given: dict[str, Any] = msgspec.to_builtins(self.line)
        given.pop("id")
        size = {"num_frames": self.shape.frames, "height": self.shape.height, "width": self.shape.width}
        return given | size


def tasks_of(file: Path, bundle: Bundle, made_by: str) -> list[Task]:
    """Read a batch, and check every line of it.

    Args:
        file: JSON lines; empty ones mean nothing.
        bundle: What makes the videos.
        made_by: What is meant to make them: the bundle's identity and the engine.

    Raises:
        PromptError: Lines are no prompts, or ask for what the bundle cannot make; says which, and why.
    """
    text = read_whole(file, PromptError, fix="name a file of JSON lines, each with a prompt", limit=_MOST_BYTES)
    tasks: dict[str, tuple[int, Task]] = {}
    bad: list[tuple[str, str]] = []
    for number, written in enumerate(text.splitlines(), 1):
        if not written.strip():
            continue
        try:
            task = _task(written, file.parent, bundle, made_by)
            first, _ = tasks.setdefault(task.id, (number, task))
            if first != number:
                raise PromptError(f"it is line {first} again", fix="give it another seed, or an id of its own")
        except CvxError as error:
            bad.append((f"{file}:{number}: {safe(error.what)}", error.fix))
    if bad:
        more = f", and {len(bad) - _MOST_TOLD} more lines" if len(bad) > _MOST_TOLD else ""
        raise PromptError("; ".join(what for what, _ in bad[:_MOST_TOLD]) + more, fix=_fix(fix for _, fix in bad))
    if not tasks:
        raise PromptError(f"{file} has no line", fix='write lines such as {"prompt": "a red circle"}')
    return [task for _, task in tasks.values()]


def _fix(fixes: Iterable[str]) -> str:
    return "; ".join(list(dict.fromkeys(fixes))[:3])


def _task(written: bytes, folder: Path, bundle: Bundle, made_by: str) -> Task:
    line = _line(written)
    content = hashlib.sha256(msgspec.json.encode(line)).hexdigest()
    line = msgspec.structs.replace(
        line,
        id=content[:16] if line.id is None else line.id,
        seed=int(content[16:24], 16) if line.seed is None else line.seed,
        **{name: str(folder / path) for name, path in _sources(line)},
    )
    seen = bundle_at(bundle, ShapeChoice(line.num_frames, line.height, line.width))
    _check(line, seen)
    digest = hashlib.sha256(made_by.encode() + msgspec.json.encode(line))
    for _, path in _sources(line):
        digest.update(_stamp(Path(path)).encode())
    return Task(line, digest.hexdigest()[:16], seen.shape, seen.manifest.fps)


def _line(written: bytes) -> Line:
    try:
        line = msgspec.json.decode(written, type=Line)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        fix = f"use the fields {', '.join(Line.__struct_fields__)}"
        raise PromptError(f"it is no line of a batch: {error}", fix=fix) from error
    if line.id is not None and not _PLAIN.fullmatch(line.id):
        raise PromptError(f"the id {line.id!r} cannot name a file", fix="use letters, digits, '.', '_' and '-'")
    if not line.prompt.strip():
        raise PromptError("the prompt is empty", fix="say what is to be seen")
    return line


def _sources(line: Line) -> Iterator[tuple[str, str]]:
    for name in ("image", "video"):
        if (path := getattr(line, name)) is not None:
            yield name, path


def _stamp(path: Path) -> str:
    """Return what tells whether a source has changed."""
    try:
        found = path.stat()
    except OSError as error:
        raise MediaError(f"{path} cannot be read: {error.strerror}", fix="check the path") from error
    return f"{found.st_size} {found.st_mtime_ns}"


def _check(line: Line, bundle: Bundle) -> None:
    """Refuse what the pipeline would refuse once it runs; sources stand in as empty pixels."""
    empty = np.empty(0, np.float32)
    defaults = bundle.manifest.defaults
    if line.strength is not None and line.video is None:
        raise PromptError("strength means nothing without a video", fix="leave it out")
    request = RunRequest(
        (line.prompt,),
        negative_prompt=line.negative_prompt,
        image=None if line.image is None else empty,
        video=None if line.video is None else empty,
        strength=0.8 if line.strength is None else line.strength,
        steps=defaults.steps if line.num_inference_steps is None else line.num_inference_steps,
        guidance_scale=defaults.guidance_scale if line.guidance_scale is None else line.guidance_scale,
        seed=line.seed or 0,
        cache=line.cache,
    )
    check_task(bundle, request)
    check_schedule(bundle, request)
    if bundle.shape.height % 2 or bundle.shape.width % 2:
        raise ShapeError(f"{bundle.shape} has odd sides, and a batch makes mp4", fix="use another size")
