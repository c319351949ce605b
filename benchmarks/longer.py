"""Long videos of the miniatures, judged: ten clips in a chain, overlaps, frames between frames, and memory.

    python benchmarks/longer.py WORK chains between memory    # lines in WORK; goes on where it was cut off
    python benchmarks/longer.py WORK report                   # benchmarks/results/longer.md, and a picture in docs/

The world has no words for "and then", so that a chain's prompts take turns: right and left, grows and shrinks. What a
clip shows is judged by benchmarks/miniature/judge.py, over its own frames and the one that it starts from.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from numpy.typing import NDArray
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "benchmarks" / "miniature")]

from captions import captions_of, meaning_of  # noqa: E402
from judge import verdict_on  # noqa: E402
from report import conditions, write  # noqa: E402
from world import random_scenes  # noqa: E402

from cvx_deploy import Pipeline  # noqa: E402
from cvx_deploy.longer import chain as chains  # noqa: E402
from cvx_deploy.longer.chain import Chain  # noqa: E402
from cvx_deploy.measure.difference import psnr  # noqa: E402
from cvx_deploy.media.interpolation import Interpolation, Rate  # noqa: E402
from cvx_deploy.pipeline.events import Frames  # noqa: E402

WORK = Path(sys.argv[1] if len(sys.argv) > 1 else "longer")
LINES = WORK / "lines.jsonl"
DOCS = ROOT / "docs"
SEED, CLIPS, FPS, CLIP = 7, 10, 8, 9
SCENES: dict[str, tuple[str, str]] = {
    "a blue square moves {}": ("up", "down"),
    "a red circle moves to the {}": ("right", "left"),
    "a green triangle {}": ("grows", "shrinks"),
    "a large yellow disc {} on a dark background": ("goes left", "goes right"),
    "a purple square {}": ("stays still", "does not move"),
    "a cyan triangle drifts {}": ("left", "right"),
}
PLAIN_SCENES = 1
WAYS = ("held", "free", "plain")
"""Colours held at the first clip's; matched at each seam alone; not at all."""
OVERLAPS = (3,)
_PROGRAM = """
import resource
from cvx_deploy.cli import main
try:
    main()
finally:
    print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
Video = NDArray[np.float32]


def chain_of(scene: str, way: str, overlap: int, first: Pipeline, then: Pipeline) -> tuple[Video, list[dict[str, Any]]]:
    """Return the frames of a chain of ten clips, or of 60 frames where more is shared, and what its clips are."""
    chain = Chain(first, then)
    frames = CLIP + (CLIPS - 1) * (CLIP - 1) if overlap == 1 else 60
    starts = chain.lengths(overlap).starts(frames)
    prompts = [scene.format(SCENES[scene][index % 2]) for index in range(len(starts))]
    clips = chain.clips(prompts, frames, seed=SEED, overlap=overlap)
    plain = mock.patch.object(chains, "matched", lambda clip, shared, levels: clip)
    with plain if way == "plain" else mock.patch.object(chains, "_PIECE", chains._PIECE):
        events = list(chain.stream(prompts, num_frames=frames, seed=SEED, overlap=overlap, hold_colours=way == "held"))
    video = np.concatenate([event.frames for event in events if isinstance(event, Frames)])
    said = [{"start": clip.start, "frames": clip.frames, "prompt": clip.prompt} for clip in clips]
    return video, said


def judged(video: Video, clips: list[dict[str, Any]], overlap: int) -> dict[str, Any]:
    """Return what a chain's clips show, how far its seams and its neighbouring frames are apart, and its levels."""
    right = []
    for clip in clips:
        begin = max(clip["start"] - overlap, 0)
        said, seen = meaning_of(clip["prompt"]), verdict_on(video[begin : clip["start"] + clip["frames"]])
        right.append({name: getattr(seen, name) == said[name] for name in ("shape", "colour", "motion")})
    steps = np.sqrt(np.square(np.diff(video.astype(np.float64), axis=0)).mean(axis=(1, 2, 3)))
    seams = sorted({at for clip in clips[1:] for at in range(clip["start"] - overlap, clip["start"])})
    within = np.delete(steps, seams)
    parts = [video[clip["start"] : clip["start"] + clip["frames"]] for clip in clips]
    return {
        "right": right,
        "seams": steps[seams].round(5).tolist(),
        "neighbours": within.round(5).tolist(),
        "mean": [round(float(part.mean()), 5) for part in parts],
        "median": [round(float(np.median(part.reshape(-1, 3), axis=0).mean()), 5) for part in parts],
        "bright": [round(float(np.quantile(part.max(axis=-1), 0.98)), 5) for part in parts],
    }


def measure_chains() -> Iterator[dict[str, Any]]:
    """Yield what is not in the lines yet."""
    there = {(line["scene"], line["way"], line["overlap"]) for line in lines("chain")}
    first, then = (Pipeline.from_pretrained(name, threads=1) for name in ("mini", "mini-i2v"))
    wanted = [(scene, "held", 1) for scene in SCENES]
    few = list(SCENES)[1 : 1 + PLAIN_SCENES]
    wanted += [(scene, way, 1) for scene in few for way in WAYS[1:]]
    wanted += [(scene, "held", overlap) for scene in few for overlap in OVERLAPS]
    for scene, way, overlap in wanted:
        if (scene, way, overlap) in there:
            continue
        video, clips = chain_of(scene, way, overlap, first, then)
        if overlap == 1 and way == "held":
            np.save(WORK / f"longer-{list(SCENES).index(scene)}.npy", video)
        yield {"kind": "chain", "scene": scene, "way": way, "overlap": overlap, **judged(video, clips, overlap)}


def measure_between() -> Iterator[dict[str, Any]]:
    """Yield how near every other frame of a run comes when it is left out and made again, in dB."""
    if lines("between"):
        return
    scenes = random_scenes((2026, 25), 12, "held-out")
    captions = captions_of(scenes, (2026, 25, 1))
    with Pipeline.from_pretrained("mini", threads=1) as pipeline:
        videos = pipeline(captions, seed=SEED).frames
    for caption, video in zip(captions, videos, strict=True):
        half, left_out = video[::2], video[1::2]
        made = np.concatenate(list(Interpolation(Rate(4, 8)).add(half)))[1::2]
        ways = {"flow": made, "blend": (half[1:] + half[:-1]) / 2, "double": half[:-1]}
        found = {way: round(psnr(frames, left_out), 3) for way, frames in ways.items()}
        yield {"kind": "between", "caption": caption, **found}


def measure_memory() -> Iterator[dict[str, Any]]:
    """Yield the peak resident memory of `run` for chains of one, two and twenty clips, in processes of their own."""
    if lines("memory"):
        return
    with tempfile.TemporaryDirectory() as folder:
        image = Path(folder) / "image.png"
        Image.fromarray(np.full((48, 48, 3), 200, np.uint8)).save(image)
        for clips in (1, 10):
            frames = CLIP + (clips - 1) * (CLIP - 1)
            for model, given in (("mini-i2v", ("--image", str(image))), ("mini", ())):
                peaks = [_peak(model, given, frames, Path(folder) / "out.mp4") for _ in range(2)]
                yield {"kind": "memory", "model": model, "frames": frames, "peaks": peaks}


def _peak(model: str, given: tuple[str, ...], frames: int, output: Path) -> int:
    """Return the peak resident bytes of one run."""
    words = [
        "run",
        "--model",
        model,
        "--prompt",
        "a red circle stays still",
        "--steps",
        "2",
        "--threads",
        "1",
        "--quiet",
    ]
    words += ["--frames", str(frames), "--long", "chain", "--output", str(output), *given]
    done = subprocess.run([sys.executable, "-c", _PROGRAM, *words], capture_output=True, text=True, check=True)
    return 1024 * int(done.stdout.split("peak ")[1])


def lines(kind: str) -> list[dict[str, Any]]:
    """Return what was measured of a kind."""
    found = [json.loads(line) for line in LINES.read_text().splitlines()] if LINES.exists() else []
    return [line for line in found if line["kind"] == kind]


def report() -> None:
    """Write the results, and the picture of the docs."""
    chained, between, memory = lines("chain"), lines("between"), lines("memory")
    text = ["# Long videos of the miniatures", "", "By benchmarks/longer.py.", "", "## Chains", ""]
    text += [f"`mini`, then `mini-i2v`: {CLIPS} clips of {CLIP} frames, whose prompts take turns.", "", *_HEAD]
    text += [*map(_row, chained), "", *_LEGEND, "", "## Frames between frames", ""]
    text += [f"Every other frame of {len(between)} runs of `mini` left out and made again, in dB:", ""]
    text += ["| caption | flow | blended | doubled |", "| --- | --- | --- | --- |"]
    text += [f"| {one['caption']} | {one['flow']:.1f} | {one['blend']:.1f} | {one['double']:.1f} |" for one in between]
    if between:
        middle = [f"{np.median([one[way] for one in between]):.1f}" for way in ("flow", "blend", "double")]
        text += [f"| median | {' | '.join(middle)} |"]
    text += ["", "## Memory", "", "Peak resident memory of `run --long chain` (ru_maxrss), the larger of two runs:", ""]
    text += ["| model | frames | MB |", "| --- | --- | --- |"]
    text += [f"| {one['model']} | {one['frames']} | {max(one['peaks']) / 1e6:.0f} |" for one in memory]
    told = conditions(TOOLS, "many other programs ran beside it", threads=1, seed=SEED, steps="50; memory: 2")
    results = {"chains": chained, "between": between, "memory": memory}
    write(ROOT / "benchmarks" / "results" / "longer", told, results, text)
    _picture()


TOOLS = ("onnxruntime", "numpy", "opencv-python-headless", "av")
_HEAD = [
    "| prompts | colours | overlap | right: colour, motion, shape | seams / elsewhere | median | bright | mean |",
    "| --- | --- | --- | --- | --- | --- | --- | --- |",
]
_LEGEND = [
    "Right is what the judge sees in each clip. Seams and elsewhere are the largest root mean square of the difference",
    "of two frames one after the other, where clips meet and elsewhere. Median, bright (98% of pixels are darker) and",
    "mean are the largest change of a clip's brightness from the first one's. The mean sees how large a shape is, too.",
]
_LEVELS = ("median", "bright", "mean")


def _row(line: dict[str, Any]) -> str:
    right = ", ".join(str(sum(one[name] for one in line["right"])) for name in ("colour", "motion", "shape"))
    drifts = [f"{100 * max(abs(value / line[name][0] - 1) for value in line[name]):.1f}%" for name in _LEVELS]
    jumps = f"{max(line['seams']):.3f} / {max(line['neighbours']):.3f}"
    scene = line["scene"].format(" / ".join(SCENES[line["scene"]]))
    cells = (scene, line["way"], line["overlap"], f"{right} of {len(line['right'])}", jumps, *drifts)
    return f"| {' | '.join(map(str, cells))} |"


def _picture() -> None:
    """Show every fourth frame of the first 60 of some chains, a row each."""
    videos = [np.load(path)[:60:4] for path in sorted(WORK.glob("longer-*.npy"))[:3]]
    edges = ((0, 0), (0, 2), (0, 2), (0, 0))
    rows = [np.concatenate(list(np.pad(video, edges, constant_values=1)), axis=1) for video in videos]
    if rows:
        Image.fromarray((np.concatenate(rows) * 255).round().astype(np.uint8)).save(DOCS / "longer.webp", quality=80)


def main() -> None:
    """Measure, or report."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if sys.argv[2:] == ["report"]:
        report()
        return
    what = {"chains": measure_chains, "between": measure_between, "memory": measure_memory}
    for name in sys.argv[2:]:
        for line in what[name]():
            with LINES.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(json.dumps(line)[:200], flush=True)


if __name__ == "__main__":
    main()
