"""Measure what forecasting steps costs in quality: the miniatures' videos against those of the full run, and judged.

    python benchmarks/step_cache.py [--first N] [--count N] [--i2v N] [--steps N] [--guidance-scale G] [--case NAME]
                                    [--kept FILE] [--output results/step_cache]

Each held-out caption's video is made with all steps, with steps forecast, and with fewer steps, one after the other
from the same seed. What is measured is kept in `--kept`; the same command goes on from there. The tables of the cases
that are calibrated are made at the start, of captions that the miniature was trained on.
"""

import argparse
import json
import shutil
import statistics
import sys
import tempfile
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
from cvx_deploy.bundle.opened import Bundle
from cvx_deploy.engines.onnxruntime.backend import OrtBackend
from cvx_deploy.measure.difference import VideoDifference, video_difference
from cvx_deploy.miniatures import miniature
from cvx_deploy.pipeline.calibration import CacheCalibration, calibrate_cache, keep_table
from cvx_deploy.pipeline.schedulers import SCHEDULERS
from cvx_deploy.progress import SilentProgress

sys.path.insert(0, str(Path(__file__).with_name("miniature")))
from captions import captions_of
from score import held_out_examples, score
from world import random_scenes, videos_of

TOOLS = ("onnxruntime", "numpy", "scikit-image")
FULL = "all steps"
FAST = "--fast"
CALIBRATED = "calibrated, "
CALIBRATION_PROMPTS, CALIBRATION_SEED = 12, 777
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
    """Return what is compared, by name, as keywords of a call; the full run first.

    Those that begin with `CALIBRATED` are for a bundle with tables of steps.
    """
    tolerances = (0.05, 0.1, 0.2) if scheduler == "ddim" else (0.03, 0.05, 0.08)
    return {
        FULL: {},
        FAST: {"fast": True},
        "--cache-speedup 2.6": {"cache": "fixed", "cache_speedup": 2.6},
        **{f"{CALIBRATED}{s:g}": {"cache": "fixed", "cache_speedup": s} for s in (2.0, 2.6)},
        **{f"--cache-tolerance {t}": {"cache": "adaptive", "cache_tolerance": t} for t in tolerances},
        **{f"{n} steps": {"num_inference_steps": n} for n in (round(steps / 2), round(steps / 2.6))},
    }


def calibrate(folder: Path, steps: int, guidance_scale: float) -> None:
    """Put the tables of both schedulers into a copy of mini's bundle."""
    captions = captions_of(random_scenes((CALIBRATION_SEED,), CALIBRATION_PROMPTS, "train"), (CALIBRATION_SEED,))
    backend = OrtBackend(Bundle.open(folder), threads=1)
    for scheduler in SCHEDULERS:
        wanted = CacheCalibration(tuple(captions), steps, guidance_scale, scheduler, 1000, (2.0, 2.6))
        keep_table(folder, calibrate_cache(backend, wanted, SilentProgress()))
    backend.close()


@dataclass(frozen=True)
class Plan:
    """What of a model is measured.

    Attributes:
        first: The first caption, from 0; `count` the one after the last.
        guidance_scale: None for the model's own.
        only: The cases, if not all.
    """

    model: str
    first: int
    count: int
    steps: int
    guidance_scale: float | None
    only: tuple[str, ...]

    def cases(self, scheduler: str) -> dict[str, dict[str, Any]]:
        """Return the cases that are wanted."""
        found = cases(scheduler, self.steps)
        known = {case: call for case, call in found.items() if self.model == "mini" or not _is_calibrated(case)}
        return {case: call for case, call in known.items() if not self.only or case in (FULL, *self.only)}


def _is_calibrated(case: str) -> bool:
    return case.startswith(CALIBRATED)


def measured(plan: Plan, plain: Pipeline, calibrated: Pipeline, kept: dict[Any, Row]) -> Iterator[Row]:
    """Yield the rows of a model's captions that are not in `kept`."""
    scenes, captions = held_out_examples(plan.count)
    images = (videos_of(scenes)[:, 0] * 255).round().astype(np.uint8) if plan.model == "mini-i2v" else None
    for number in range(plan.first, plan.count):
        for scheduler in SCHEDULERS:
            wanted = plan.cases(scheduler)
            missing = [case for case in wanted if (plan.model, scheduler, case, number) not in kept]
            full: Video | None = None
            before = 0.0
            for case in dict.fromkeys((FULL, *missing)) if missing else ():
                given = {"num_inference_steps": plan.steps, "scheduler": scheduler, "seed": number, **wanted[case]}
                given |= {"guidance_scale": plan.guidance_scale}
                pipe = calibrated if _is_calibrated(case) else plain
                start = time.perf_counter()
                made = pipe(captions[number], image=None if images is None else images[number], **given)
                seconds = time.perf_counter() - start
                video = made.frames[0]
                full, before = (video, seconds) if full is None else (full, before)
                taken = made.report.steps.get(0)
                calls = given["num_inference_steps"] if taken is None else len(taken.run)
                right = bool(score(video[None], [captions[number]]).all.right)
                far, faster = _rounded(video_difference(video, full)), round(before / seconds, 3)
                if case in missing:
                    yield Row(plan.model, scheduler, case, number, calls, round(seconds, 4), right, faster, *far)


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
    parser.add_argument("--first", type=int, default=0, help="the first held-out caption of mini")
    parser.add_argument("--count", type=int, default=200, help="the one after the last")
    parser.add_argument("--i2v", type=int, default=40, help="captions of mini-i2v")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance-scale", type=float, help="default: each model's own")
    parser.add_argument("--case", action="append", default=[], help="measure this case only; again for more")
    parser.add_argument("--kept", type=Path, default=Path("outputs/step_cache.jsonl"))
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "step_cache")
    arguments = parser.parse_args()
    kept = read_rows(arguments.kept)
    arguments.kept.parent.mkdir(parents=True, exist_ok=True)
    guidance = {}
    with arguments.kept.open("a", encoding="utf-8") as file:
        for model, first, count in (("mini", arguments.first, arguments.count), ("mini-i2v", 0, arguments.i2v)):
            plan = Plan(model, first, count, arguments.steps, arguments.guidance_scale, tuple(arguments.case))
            own = Bundle.open(miniature(model)).manifest.defaults.guidance_scale
            guidance[model] = own if plan.guidance_scale is None else plan.guidance_scale
            for row in run_plan(plan, guidance[model], kept):
                kept[row.key] = row
                print(json.dumps(asdict(row)), file=file, flush=True)
    note = "other programs ran beside it: seconds are compared within pairs only"
    told = conditions(
        TOOLS,
        note,
        steps=arguments.steps,
        guidance_scale=guidance,
        threads=1,
        captions=f"{arguments.first} to {arguments.count - 1} of mini, 0 to {arguments.i2v - 1} of mini-i2v",
        calibration=f"{CALIBRATION_PROMPTS} captions of the training set, seeds from 1000",
    )
    found = summary(kept.values(), arguments.steps)
    write(arguments.output, told, {"results": found}, table(found))


def run_plan(plan: Plan, guidance_scale: float, kept: dict[Any, Row]) -> Iterator[Row]:
    """Yield what is missing of a plan, with a calibrated bundle beside the plain one where a case asks for it."""
    if plan.first >= plan.count:
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / plan.model
        shutil.copytree(miniature(plan.model), copy)
        if any(_is_calibrated(case) for case in plan.cases("ddim")):
            calibrate(copy, plan.steps, guidance_scale)
        with Pipeline.from_pretrained(plan.model, threads=1) as plain, Pipeline.from_bundle(copy, threads=1) as tables:
            image = None if plan.model == "mini" else np.zeros((48, 48, 3))
            for pipe in (plain, tables):
                pipe("a red circle grows", image=image, num_inference_steps=2)  # warm
            yield from measured(plan, plain, tables, kept)


if __name__ == "__main__":
    main()
