"""Measure what `--fast` saves in seconds, in interleaved pairs, and what it does to an int8 bundle.

    python benchmarks/step_cache_seconds.py --work DIR [--pairs N] [--captions N] [--output results/step_cache_seconds]

Pairs are of the miniature, and of two blocks of the 5B's width with random weights; in each a plain call and a fast one
of the same pipeline follow each other, warm. The int8 bundle's video with steps forecast is held against its own full
run, and against that of the fp32 bundle.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from quantization import bundle_of
from report import conditions, write

from cvx_deploy import Pipeline
from cvx_deploy.bundle.opened import Bundle
from cvx_deploy.exporters.export import ExportRequest, bundle_from_checkpoint
from cvx_deploy.exporters.sources.synth import synthesize
from cvx_deploy.measure.difference import psnr
from cvx_deploy.miniatures import miniature
from cvx_deploy.progress import SilentProgress
from cvx_deploy.shape import Shape

sys.path.insert(0, str(Path(__file__).with_name("miniature")))
from score import held_out_examples, score

TOOLS = ("onnxruntime", "numpy")
WIDE_SHAPE = Shape(9, 240, 352)
WIDE_STEPS = 10


def pairs(pipe: Pipeline, count: int, **given: Any) -> dict[str, Any]:
    """Return the seconds of plain and of fast calls, each pair one after the other, after one of each."""
    found: list[tuple[float, float, float, float]] = []
    for number in range(count + 1):
        taken: list[float] = []
        for fast in (False, True):
            start = time.perf_counter()
            made = pipe("a red circle moves to the right", seed=number, fast=fast, **given)
            taken += [time.perf_counter() - start, made.report.stages["transformer"]]
        found.append((taken[0], taken[2], taken[1], taken[3]))
    plain, fast_, transformer, forecast = zip(*found[1:], strict=True)
    whole = [one / other for one, other in zip(plain, fast_, strict=True)]
    inner = [one / other for one, other in zip(transformer, forecast, strict=True)]
    return {
        "pairs": count,
        "plain_seconds": _spread(plain),
        "fast_seconds": _spread(fast_),
        "faster": _spread(whole),
        "faster_transformer": _spread(inner),
    }


def _spread(values: Any) -> dict[str, float]:
    return {
        "median": round(statistics.median(values), 3),
        "least": round(min(values), 3),
        "most": round(max(values), 3),
    }


def wide(work: Path) -> Bundle:
    """Export two blocks of the 5B's width, unless they are there."""
    checkpoint, output = work / "wide-checkpoint", work / "wide"
    if not checkpoint.is_dir():
        synthesize("5b", "wide", checkpoint)
    if not output.is_dir():
        bundle_from_checkpoint(ExportRequest("5b", checkpoint, shapes=(WIDE_SHAPE,)), output, SilentProgress())
    return Bundle.open(output)


def int8(work: Path, captions: int) -> dict[str, Any]:
    """Return how far int8 videos with steps forecast are from their own full runs, and from those of fp32."""
    folder = bundle_of("int8/fp32", work, SilentProgress()).path
    _, texts = held_out_examples(captions)
    found: dict[str, Any] = {}
    with Pipeline.from_bundle(folder, threads=1) as small, Pipeline.from_bundle(miniature("mini"), threads=1) as fp32:
        for scheduler in ("ddim", "dpm"):
            own, other, quantized, right = [], [], [], 0
            for seed, text in enumerate(texts):
                given: dict[str, Any] = {"seed": seed, "scheduler": scheduler}
                reference = fp32(text, **given).frames[0]
                full = small(text, **given).frames[0]
                fast = small(text, **given, fast=True).frames[0]
                own.append(psnr(fast, full))
                other.append(psnr(fast, reference))
                quantized.append(psnr(full, reference))
                right += score(fast[None], [text]).all.right
            found[scheduler] = {
                "captions": captions,
                "right": right,
                "fast_to_own_full_run": round(statistics.median(own), 1),
                "fast_to_fp32": round(statistics.median(other), 1),
                "full_to_fp32": round(statistics.median(quantized), 1),
            }
    return found


def table(found: dict[str, Any]) -> list[str]:
    """Lay the figures out as lines of Markdown."""
    lines = ["# What forecasting half of the steps saves", ""]
    lines += [
        "| | pairs | plain | fast | faster, whole call | faster, transformer |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for title, told in found["pairs"].items():
        plain, fast = (told[name]["median"] for name in ("plain_seconds", "fast_seconds"))
        whole, inner = (
            f"{told[name]['median']} ({told[name]['least']} to {told[name]['most']})"
            for name in ("faster", "faster_transformer")
        )
        lines.append(f"| {title} | {told['pairs']} | {plain} s | {fast} s | {whole} | {inner} |")
    lines += ["", "With int8, medians of PSNR:", ""]
    lines += ["| | captions | right | fast to its own full run | fast to fp32 | full to fp32 |"]
    lines += ["| --- | --- | --- | --- | --- | --- |"]
    for scheduler, told in found["int8"].items():
        figures = " | ".join(f"{told[name]} dB" for name in ("fast_to_own_full_run", "fast_to_fp32", "full_to_fp32"))
        lines.append(f"| {scheduler} | {told['captions']} | {told['right']} | {figures} |")
    return lines


def main() -> None:
    """Read the command line, measure, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="where bundles are kept")
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument("--captions", type=int, default=12)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "step_cache_seconds")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    measured: dict[str, Any] = {}
    with Pipeline.from_bundle(miniature("mini"), threads=1) as pipe:
        measured["mini, 50 steps of ddim"] = pairs(pipe, arguments.pairs)
        measured["mini, 50 steps of dpm"] = pairs(pipe, arguments.pairs, scheduler="dpm")
    with Pipeline.from_bundle(wide(arguments.work).path, threads=1) as pipe:
        given = {"num_inference_steps": WIDE_STEPS, "output_type": "latent"}
        title = f"two blocks of the 5B's width, {WIDE_SHAPE}, {WIDE_STEPS} steps of dpm, not decoded"
        measured[title] = pairs(pipe, max(arguments.pairs // 4, 1), **given)
    found = {"pairs": measured, "int8": int8(arguments.work, arguments.captions)}
    told = conditions(TOOLS, "other programs ran beside it: compared within pairs only", threads=1)
    write(arguments.output, told, {"results": found}, table(found))


if __name__ == "__main__":
    main()
