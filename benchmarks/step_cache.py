"""Measure what forecasting steps costs in quality: the miniatures' videos against those of the full run, and judged.

    python benchmarks/step_cache.py [--count N] [--i2v N] [--steps N] [--kept FILE] [--output results/step_cache]

Each held-out caption's video is made with all steps, with steps forecast, and with fewer steps, one after the other
from the same seed. What is measured is kept in `--kept`; the same command goes on from there.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from report import conditions, write

from cvx_deploy import Pipeline
from cvx_deploy.bench.results import percentile
from cvx_deploy.measure.difference import VideoDifference, video_difference
from cvx_deploy.pipeline.schedulers import SCHEDULERS

sys.path.insert(0, str(Path(__file__).with_name("miniature")))
from score import held_out_examples, score
from world import videos_of

TOOLS = ("onnxruntime", "numpy", "scikit-image")
FULL = "all steps"
FAST = "--fast"
Video = NDArray[np.float32]  # (frames, height, width, 3) in [0, 1]


@dataclass(frozen=True)
class Row:
    """One video.

    Attributes:
        model: mini or mini-i2v; `scheduler`, `case` and `caption` (its number) say which video.
        calls: How often the transformer was run.
        seconds: Of the whole call, warm.
        right: Whether the judge saw the caption's shape, colour and motion.
        faster: The seconds of the video of all steps, made just before, over `seconds`; None where it was not.
        psnr: Against the video of all steps, in dB; `ssim` and `flicker` likewise.
    """

    model: str
    scheduler: str
    case: str
    caption: int
    calls: int
    seconds: float
    right: bool
    faster: float | None
    psnr: float
    ssim: float
    flicker: float

    @property
    def key(self) -> tuple[str, str, str, int]:
        """Say which video it is."""
        return self.model, self.scheduler, self.case, self.caption


def cases(scheduler: str, steps: int) -> dict[str, dict[str, Any]]:
    """Return what is compared, by name, as keywords of a call; the full run first."""
    tolerances = (0.05, 0.1, 0.2) if scheduler == "ddim" else (0.03, 0.05, 0.08)
    return {
        FULL: {},
        FAST: {"fast": True},
        "--cache-speedup 2.6": {"cache": "fixed", "cache_speedup": 2.6},
        **{f"--cache-tolerance {t}": {"cache": "adaptive", "cache_tolerance": t} for t in tolerances},
        **{f"{n} steps": {"num_inference_steps": n} for n in (round(steps / 2), round(steps / 2.6))},
    }


def measured(pipe: Pipeline, model: str, count: int, steps: int, kept: dict[Any, Row]) -> Iterator[Row]:
    """Yield the rows of a model's captions that are not in `kept`."""
    scenes, captions = held_out_examples(count)
    images = (videos_of(scenes)[:, 0] * 255).round().astype(np.uint8) if model == "mini-i2v" else None
    for number, caption in enumerate(captions):
        for scheduler in SCHEDULERS:
            wanted = cases(scheduler, steps)
            missing = [case for case in wanted if (model, scheduler, case, number) not in kept]
            full: Video | None = None
            plain = 0.0
            for case in dict.fromkeys((FULL, *missing)) if missing else ():
                call = wanted[case]
                given = {"num_inference_steps": steps, "scheduler": scheduler, "seed": number, **call}
                start = time.perf_counter()
                made = pipe(caption, image=None if images is None else images[number], **given)
                seconds = time.perf_counter() - start
                video = made.frames[0]
                full, plain = (video, seconds) if full is None else (full, plain)
                taken = made.report.steps.get(0)
                calls = given["num_inference_steps"] if taken is None else len(taken.run)
                right = bool(score(video[None], [caption]).all.right)
                far = video_difference(video, full)
                if case in missing:
                    yield Row(
                        model,
                        scheduler,
                        case,
                        number,
                        calls,
                        round(seconds, 4),
                        right,
                        round(plain / seconds, 3),
                        *_rounded(far),
                    )


def _rounded(far: VideoDifference) -> tuple[float, float, float]:
    return round(far.psnr, 2), round(far.ssim, 5), round(far.flicker, 6)


def summary(rows: Iterable[Row], steps: int) -> dict[str, Any]:
    """Return by model, scheduler and case: captions right, work saved, and how far from the full run."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.model, row.scheduler, row.case), []).append(row)
    found: dict[str, Any] = {}
    for (model, scheduler, case), members in groups.items():
        psnrs, ssims = [row.psnr for row in members], [row.ssim for row in members]
        faster = [row.faster for row in members if row.faster is not None]
        found.setdefault(f"{model}, {scheduler}", {})[case] = {
            "captions": len(members),
            "right": sum(row.right for row in members),
            "work": round(steps * len(members) / sum(row.calls for row in members), 2),
            "psnr": {"median": round(statistics.median(psnrs), 1), "p10": round(percentile(psnrs, 10), 1)},
            "ssim": {"median": round(statistics.median(ssims), 4), "p10": round(percentile(ssims, 10), 4)},
            "flicker": round(statistics.median(row.flicker for row in members), 5),
            "end_to_end": round(statistics.median(faster), 2) if faster else None,
        }
    return found


def table(found: dict[str, Any]) -> list[str]:
    """Lay the summary out as lines of Markdown."""
    lines = ["# Steps that are forecast", ""]
    for title, by_case in found.items():
        lines += [
            f"## {title}",
            "",
            "| | transformer calls | videos right | PSNR median | p10 | SSIM median | p10 | flicker | end to end |",
            "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        ]
        for case, told in by_case.items():
            if case == FULL:
                lines.append(f"| {case} | 1 | {told['right']} of {told['captions']} | | | | | | 1 |")
                continue
            faster = told["end_to_end"]
            lines.append(
                f"| {case} | {told['work']:.2f}x fewer | {told['right']} of {told['captions']} "
                f"| {told['psnr']['median']} dB | {told['psnr']['p10']} dB | {told['ssim']['median']} "
                f"| {told['ssim']['p10']} | {told['flicker']} | {'not measured' if faster is None else f'{faster}x'} |"
            )
        lines.append("")
    return [
        *lines,
        "Against the video of all steps from the same seed. A video is right where the judge sees the caption's shape,",
        "colour and motion. End to end: the median over pairs of calls, warm, one after the other, text encoder and",
        "VAE among them.",
    ]


def read_rows(path: Path) -> dict[Any, Row]:
    """Return the rows that an earlier run kept."""
    if not path.exists():
        return {}
    rows = [Row(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    return {row.key: row for row in rows}


def main() -> None:
    """Read the command line, measure what is not there yet, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200, help="held-out captions of mini")
    parser.add_argument("--i2v", type=int, default=40, help="of mini-i2v")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--kept", type=Path, default=Path("outputs/step_cache.jsonl"))
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "step_cache")
    arguments = parser.parse_args()
    kept = read_rows(arguments.kept)
    arguments.kept.parent.mkdir(parents=True, exist_ok=True)
    guidance = {}
    with arguments.kept.open("a", encoding="utf-8") as file:
        for model, count in (("mini", arguments.count), ("mini-i2v", arguments.i2v)):
            with Pipeline.from_pretrained(model, threads=1) as pipe:
                guidance[model] = pipe.bundle.manifest.defaults.guidance_scale
                pipe("a red circle grows", image=None if model == "mini" else np.zeros((48, 48, 3)))  # warm
                for row in measured(pipe, model, count, arguments.steps, kept):
                    kept[row.key] = row
                    print(json.dumps(asdict(row)), file=file, flush=True)
    note = "other programs ran beside it: seconds are compared within pairs only"
    told = conditions(TOOLS, note, steps=arguments.steps, guidance_scale=guidance, threads=1)
    found = summary(kept.values(), arguments.steps)
    write(arguments.output, told, {"results": found}, table(found))


if __name__ == "__main__":
    main()
