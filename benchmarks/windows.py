"""Measure what windows make of the miniature: 60 frames judged second by second, loops, wide frames, and memory.

    python benchmarks/windows.py [--count N] [--kept FILE] [--sheet FILE.webp] [--output results/windows]

What is measured is kept in `--kept`; the same command goes on from there.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from report import conditions, write

from cvx_deploy import Pipeline

sys.path.insert(0, str(Path(__file__).with_name("miniature")))
from captions import meaning_of
from judge import verdict_on
from score import held_out_examples

TOOLS = ("onnxruntime", "numpy")
FRAMES, SECOND, STEPS = 60, 8, 25
CASES: dict[str, dict[str, Any]] = {
    "overlap 4": {"num_frames": FRAMES, "overlap": 4},
    "overlap 8": {"num_frames": FRAMES, "overlap": 8},
    "overlap 4, FreeNoise": {"num_frames": FRAMES, "overlap": 4, "freenoise": True},
    "overlap 8, FreeNoise": {"num_frames": FRAMES, "overlap": 8, "freenoise": True},
    "loop": {"num_frames": 24, "loop": True},
    "loop, FreeNoise": {"num_frames": 24, "loop": True, "freenoise": True},
    "48x96": {"width": 96},
}
SHOWN = (("overlap 4, FreeNoise", 0), ("overlap 4, FreeNoise", 2), ("loop, FreeNoise", 1))
Video = NDArray[np.float32]  # (frames, height, width, 3) in [0, 1]


def psnr(one: Video, other: Video) -> float:
    """Return it in dB."""
    return float(-10 * np.log10(max(np.square(one - other).mean(dtype=np.float64), 1e-12)))


def measured(video: Video, caption: str, windows: dict[str, Any]) -> dict[str, Any]:
    """Judge every second, and compare what lies where windows begin with what lies elsewhere."""
    meaning = meaning_of(caption)
    verdicts = [verdict_on(video[start : start + SECOND]) for start in range(0, len(video) - SECOND + 1, SECOND)]
    right = {
        name: sum(getattr(verdict, name) == meaning[name] for verdict in verdicts)
        for name in ("shape", "colour", "motion")
    }
    neighbours = np.array([psnr(video[n], video[n + 1]) for n in range(len(video) - 1)])
    # A window that begins at latent frame k brings video frames from 4k - 3 on; those of a loop begin everywhere.
    seams = [] if windows["loop"] else sorted({4 * start - 4 for start in windows["frames"] if start})
    brightness = video.reshape(len(video), -1).mean(axis=1)
    return {
        "seconds": len(verdicts),
        **right,
        "worst neighbours": float(neighbours.min()),
        "median neighbours": float(np.median(neighbours)),
        "worst seam": float(neighbours[[seam for seam in seams if seam < len(neighbours)]].min()) if seams else None,
        "last to first": psnr(video[-1], video[0]),
        "brightness drift": float(abs(brightness[-SECOND:].mean() - brightness[:SECOND].mean())),
        "windows": windows["count"],
    }


def videos(count: int, kept: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield what is known of each video, making those that are missing."""
    _, captions = held_out_examples(count)
    with Pipeline.from_pretrained("mini", threads=1) as pipe:
        for number, caption in enumerate(captions):
            for case, how in CASES.items():
                key = f"{case}, caption {number}"
                if key not in kept:
                    made = pipe(caption, seed=number, num_inference_steps=STEPS, **how)
                    assert made.report.windows is not None
                    kept[key] = {"case": case, "caption": caption} | measured(
                        made.frames[0], caption, made.report.windows.as_json
                    )
                yield key, kept[key]


_PEAK = """
import resource, sys
from cvx_deploy.cli import main
try:
    main()
except SystemExit:
    pass
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)
"""


def peak(*words: object) -> float:
    """Return the most host memory, in MB, that a run of the command line took."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-c",
            _PEAK,
            "run",
            "--prompt",
            "a red circle stays",
            "--steps",
            "4",
            "--threads",
            "1",
        ]
        done = subprocess.run(
            [*command, *map(str, words), "--output", f"{folder}/video.mp4"], capture_output=True, text=True, check=True
        )
    return int(done.stderr.split()[-1]) / 1024


def sheet(path: Path) -> None:
    """Draw frames of what is shown, a row for each."""
    _, captions = held_out_examples(1 + max(number for _, number in SHOWN))
    rows = []
    with Pipeline.from_pretrained("mini", threads=1) as pipe:
        for case, number in SHOWN:
            frames = pipe(captions[number], seed=number, num_inference_steps=STEPS, **CASES[case]).frames[0]
            places = np.linspace(0, len(frames) - 1, 16).round().astype(int)
            rows.append(np.concatenate(list(frames[places]), axis=1))
    Image.fromarray(np.rint(np.concatenate(rows) * 255).astype(np.uint8)).save(path, quality=70)


def main() -> None:
    """Measure, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=6)
    parser.add_argument("--kept", type=Path, default=Path("windows-kept.json"))
    parser.add_argument("--sheet", type=Path)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("results") / "windows")
    asked = parser.parse_args()
    kept: dict[str, Any] = json.loads(asked.kept.read_text()) if asked.kept.exists() else {}
    for _ in videos(asked.count, kept):
        asked.kept.write_text(json.dumps(kept))
    for frames in (9, 90):
        kept.setdefault(
            f"peak of {frames} frames",
            [peak("--frames", frames, *(() if frames == 9 else ("--long", "windows"))) for _ in range(3)],
        )
        asked.kept.write_text(json.dumps(kept))
    if asked.sheet is not None:
        sheet(asked.sheet)
    report(asked.output, asked.count, kept)


def report(output: Path, count: int, kept: dict[str, Any]) -> None:
    """Write the JSON and the Markdown file."""
    note = "other programs used the machine meanwhile; nothing here is a time"
    told = conditions(TOOLS, note, model="mini, fp32", steps=STEPS, guidance=2, seeds=f"0 to {count - 1}")
    lines = [
        "# Windows, judged",
        "",
        f"{count} held-out captions; each video is judged second by second (8 frames), and by its pixels. Medians.",
        "",
        "| way | windows | colour right | shape right | motion right | neighbouring frames, median | the two furthest "
        "apart | furthest apart where a window begins | last and first frame | brightness, first to last second |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for case in CASES:
        rows = [row for row in kept.values() if isinstance(row, dict) and row["case"] == case]
        if rows:
            lines.append(line(case, rows))
    peaks = {key: statistics.median(value) for key, value in kept.items() if key.startswith("peak")}
    lines += [
        "",
        *(f"{key}: {value:.0f} MB (median of 3 processes of the command line)" for key, value in peaks.items()),
    ]
    write(output, told, {"videos": kept}, lines)


def line(case: str, rows: list[dict[str, Any]]) -> str:
    """Return a row of the table."""
    seconds = sum(row["seconds"] for row in rows)
    right = [f"{sum(row[name] for row in rows)} of {seconds}" for name in ("colour", "shape", "motion")]
    names = ("median neighbours", "worst neighbours", "worst seam", "last to first")
    found = {name: [row[name] for row in rows if row[name] is not None] for name in names}
    decibels = [f"{statistics.median(values):.1f} dB" if values else "-" for values in found.values()]
    drift = 100 * statistics.median(row["brightness drift"] for row in rows)
    return "| " + " | ".join([case, str(rows[0]["windows"]), *right, *decibels, f"{drift:.2f}%"]) + " |"


if __name__ == "__main__":
    main()
