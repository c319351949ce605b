"""Check a folder of clips and captions before any hour is spent on it.

    python examples/finetune/dataset.py --data DIR --model NAME

`DIR/videos/` holds the clips: files, or folders of PNG or JPEG frames. `DIR/captions.jsonl` names one of them a line:
``{"video": "waves.mp4", "caption": "waves at night"}``. The bundle's video sizes are the buckets that clips go into.
"""

import argparse
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from cvx_deploy.bundle.opened import Bundle
from cvx_deploy.errors import CvxError, MediaError
from cvx_deploy.files import sha256_of
from cvx_deploy.media.read import shape_of_video
from cvx_deploy.miniatures import bundle_folder
from cvx_deploy.pipeline.tokenizer import Tokenizer
from cvx_deploy.reading import read_whole, reading
from cvx_deploy.shape import Shape

# How far a clip's ratio of width to height may be from its bucket's: frames are resized, not cut.
_STRETCH = 0.1
_FORM = 'write one object a line: {"video": "waves.mp4", "caption": "waves at night"}'


class DatasetError(CvxError):
    """A folder of clips and captions that cannot be trained on."""


@dataclass(frozen=True)
class Clip:
    """One line of ``captions.jsonl``.

    Attributes:
        path: The clip, a file or a folder of frames.
        caption: What it shows.
        line: Where it is named, from 1.
    """

    path: Path
    caption: str
    line: int


@dataclass(frozen=True)
class Checked:
    """A clip that can be trained on: its bucket, and a SHA-256 of its content."""

    clip: Clip
    bucket: Shape
    digest: str


@dataclass(frozen=True)
class Report:
    """What a dataset holds.

    Attributes:
        clips: Those that can be trained on.
        problems: What is wrong, a line each: where, what, and how to mend it.
    """

    clips: tuple[Checked, ...]
    problems: tuple[str, ...]

    def __str__(self) -> str:
        counts = Counter(str(checked.bucket) for checked in self.clips)
        buckets = ", ".join(f"{count} at {bucket}" for bucket, count in counts.items()) or "none"
        return "\n".join([*self.problems, f"clips that can be trained on: {buckets}; problems: {len(self.problems)}"])


def read_clips(folder: Path) -> list[Clip]:
    """Return what ``captions.jsonl`` names.

    Raises:
        DatasetError: There is no such file, a line of it is no clip, or it names none.
    """
    path = folder / "captions.jsonl"
    lines = read_whole(path, DatasetError, fix=_FORM).splitlines()
    clips = [_clip(folder, path, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not clips:
        raise DatasetError(f"{path} names no clip", fix=_FORM)
    return clips


def _clip(folder: Path, path: Path, number: int, line: bytes) -> Clip:
    place = f"{path}, line {number}"
    with reading(place, DatasetError, fix=_FORM, says="is no clip"):
        said: Any = json.loads(line)
        video, caption = said["video"], said["caption"]
        if not (isinstance(video, str) and isinstance(caption, str)):
            raise TypeError("video and caption are to be texts")
    if Path(video).is_absolute() or ".." in Path(video).parts:
        raise DatasetError(f"{place} names {video}, outside of the dataset", fix=f"put it into {folder / 'videos'}")
    return Clip(folder / "videos" / video, caption, number)


def check_dataset(folder: Path, bundle: Bundle) -> Report:
    """Look at every clip and every caption, to the last frame.

    Raises:
        DatasetError: ``captions.jsonl`` cannot be read.
    """
    clips = read_clips(folder)
    stored = bundle.manifest.tokenizer
    tokenizer = Tokenizer(bundle.inside(stored.path), bundle.manifest.text_length, bundle.content(stored))
    good: list[Checked] = []
    problems: list[str] = []
    seen: dict[str, Clip] = {}
    for clip in clips:
        wrong = list(_of_caption(clip, tokenizer))
        try:
            found = Checked(clip, bucket_of(clip.path, shape_of_video(clip.path), bundle.shapes), _digest(clip.path))
        except CvxError as error:
            wrong.append(str(error))
        else:
            if (twin := seen.setdefault(found.digest, clip)) is not clip:
                wrong.append(f"{clip.path} shows the same as line {twin.line}. fix: leave one of them out.")
            if not wrong:
                good.append(found)
        problems += [f"line {clip.line}: {each}" for each in wrong]
    return Report(tuple(good), (*problems, *_uncaptioned(folder, clips)))


def _of_caption(clip: Clip, tokenizer: Tokenizer) -> Iterator[str]:
    if not clip.caption.strip():
        yield "an empty caption. fix: say what the clip shows."
    if cut := tokenizer.encode(clip.caption).cut:
        yield f"a caption of more than {tokenizer.max_length} tokens, without end: {cut[:60]!r}. fix: shorten it."


def _uncaptioned(folder: Path, clips: list[Clip]) -> Iterator[str]:
    named = {clip.path for clip in clips}
    there = sorted(path for path in (folder / "videos").glob("*") if not path.name.startswith("."))
    yield from (
        f"{path} has no caption. fix: name it in captions.jsonl, or remove it." for path in there if path not in named
    )


def bucket_of(path: Path, shape: Shape, buckets: tuple[Shape, ...]) -> Shape:
    """Return the largest bucket that a clip fills and that does not stretch it.

    Raises:
        MediaError: It is too short, too small, or of another form.
    """
    long = [bucket for bucket in buckets if bucket.frames <= shape.frames]
    if not long:
        shortest = min(bucket.frames for bucket in buckets)
        raise MediaError(f"{path} has {shape.frames} frames, and {shortest} are needed", fix="give a longer clip")
    wide = [bucket for bucket in long if bucket.height <= shape.height and bucket.width <= shape.width]
    ratio = shape.width / shape.height
    alike = [bucket for bucket in wide if abs(bucket.width / bucket.height / ratio - 1) <= _STRETCH]
    if not alike:
        raise MediaError(
            f"{path} is {shape.height}x{shape.width}, which fits none of {', '.join(map(str, buckets))}",
            fix="cut or scale it, or export the bundle with such a --shape as well",
        )
    return max(alike, key=lambda bucket: bucket.frames * bucket.height * bucket.width)


def _digest(path: Path) -> str:
    if path.is_file():
        return sha256_of(path)
    return hashlib.sha256("".join(sha256_of(file) for file in sorted(path.iterdir())).encode()).hexdigest()


def open_bundle(name: str, engines: Path) -> Bundle:
    """Open a bundle by its name, as ``cvx-deploy run --model`` does."""
    return Bundle.open(bundle_folder(name, engines))


def exit_with(run: Callable[[], None]) -> NoReturn:
    """Run, and exit: 0; 1 with one line where it fails as stated; 130 where it was interrupted."""
    try:
        run()
    except CvxError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    sys.exit(0)


def main() -> None:
    """Read the command line, check, and print the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with videos/ and captions.jsonl")
    parser.add_argument("--model", required=True, help="name of the bundle, whose sizes are the buckets")
    parser.add_argument("--engines-dir", type=Path, default=Path("engines"), help="where bundles lie by their names")
    arguments = parser.parse_args()
    report = check_dataset(arguments.data, open_bundle(arguments.model, arguments.engines_dir))
    print(report)
    require_good(report)


def require_good(report: Report) -> None:
    """Raise DatasetError where there is a problem."""
    if report.problems:
        raise DatasetError(f"{len(report.problems)} problems in the dataset", fix="mend the lines above")


if __name__ == "__main__":
    exit_with(main)
