"""A whole 5b, random weights, on a CPU: parity at full depth, whole videos by stage, and what they take of memory.

    python benchmarks/full_size.py --work DIR [--model 5b] [--part NAME ...] [--output benchmarks/results/full_size]

`DIR` keeps the checkpoint (21 GB) and bundles (31 GB). Each part has a process of its own; what is done is kept in the
output file, and a second run goes on with what is missing. A part takes minutes: the machine should be quiet for those
that are timed, and have 24 GB. Nothing is measured twice: read the figures as one run each.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from report import conditions, write

from cvx_deploy.measure.units import size_text

HERE = Path(__file__).parent
PROGRAM = (sys.executable, "-m", "cvx_deploy")
SMALL, FIRST, SECOND = "9x96x128", "9x240x368", "17x320x480"
STEPS = 2
PREVIEW = 50  # steps of a video as people make it
FORECAST = 2  # what --fast saves: every other step
VIDEOS = (
    *(
        (engine, precision, FIRST)
        for engine in ("openvino", "onnxruntime")
        for precision in ("int8", "int8wo", "int4wo")
    ),
    ("onnxruntime", "fp32", FIRST),
    ("eager", "bf16 weights, layers converted to fp32", FIRST),
    ("openvino", "int8wo", SECOND),
    ("onnxruntime", "int8wo", SECOND),
)
DEPTHS = (
    *(("onnxruntime", precision) for precision in ("fp32", "int8wo", "int4wo")),
    *(("openvino", precision) for precision in ("int8wo", "int8")),
)


def checkpoint(work: Path, model: str) -> Path:
    """Return the random checkpoint, made unless it is there."""
    place = work / f"{model}-random"
    if not place.exists():
        program("synth", "--like", model, "--scale", "full", "--output", place)
    return place


def table(work: Path, model: str) -> Path:
    """Return a table of its activations, observed at a small size unless it is there: what int8 rounds them by."""
    place = work / f"{model}-random.calibration.safetensors"
    if not place.exists():
        words = ["--model", f"{model}-random", "--checkpoint", checkpoint(work, model), "--shape", SMALL]
        words += ["--num-prompts", 1, "--steps", 3, "--guidance-scale", 1, "--compute", "fp32"]
        program("quantize", *words, "--output", place)
    return place


def bundle(work: Path, model: str, precision: str) -> Path:
    """Return its bundle in a precision, exported unless it is there."""
    place = work / f"{model}-{precision}"
    if not place.exists():
        whole = precision if precision == "fp32" else f"{precision}/fp32"
        sizes = [word for shape in (FIRST, SECOND, SMALL) for word in ("--shape", shape)]
        words = ["--model", f"{model}-random", "--checkpoint", checkpoint(work, model), "--precision", whole, *sizes]
        if precision == "int8":
            words += ["--calibration", table(work, model), "--calibration-any-shape"]
        program("export", *words, "--output", place)
    return place


def program(*words: object) -> None:
    """Run cvx-deploy."""
    subprocess.run([*PROGRAM, *map(str, words), "--quiet"], check=True, stdout=sys.stderr)


def told(script: str, *words: object) -> Any:
    """Run a script of this folder, and return what it prints."""
    command = [sys.executable, str(HERE / script), *map(str, words)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def parts(work: Path, model: str) -> dict[str, Any]:
    """Return every part by its name, as something to call."""
    found: dict[str, Any] = {}
    for engine, precision in DEPTHS:
        found[f"depth {engine} {precision}"] = lambda engine=engine, precision=precision: told(
            "full_size_depth.py", engine, bundle(work, model, precision), checkpoint(work, model), SMALL
        )
    for engine, precision, shape in VIDEOS:
        source = checkpoint if engine == "eager" else bundle
        found[f"video {engine} {precision} {shape}"] = (
            lambda engine=engine, precision=precision, shape=shape, source=source: told(
                "full_size_run.py",
                engine,
                source(work, model) if engine == "eager" else source(work, model, precision),
                shape,
                STEPS,
                work / "video.mp4",
            )
        )
    return found


def lines(results: dict[str, Any]) -> Iterator[str]:
    """Lay the results out in Markdown."""
    yield from ("# A whole model of full size on a CPU", "", f"Random weights, {STEPS} steps, no guidance, seed 7.", "")
    yield from ("Whole videos, one run each; memory is what the system cannot drop, mapped weights left out:", "")
    stages = "text encoder | transformer, loading | its steps | VAE | whole"
    yield f"| engine | precision | video | {stages} | memory | with mapped files |"
    yield "| --- " * 10 + "|"
    for name, found in results["parts"].items():
        if name.startswith("video "):
            yield video_row(name, found)
    yield from previews(results)
    depths = [depth_row(name, found) for name, found in results["parts"].items() if name.startswith("depth ")]
    if depths:
        what = "Parity at full depth: relative L2 error of the residual stream after each block, and of outputs:"
        head = "| engine | precision | block 1 | 8 | 16 | 24 | 32 | 42 | prediction | text encoder | VAE |"
        yield from ("", what, "", head, "| --- " * 11 + "|", *depths)


def previews(results: dict[str, Any]) -> Iterator[str]:
    """Extrapolate to a video of many steps with guidance: the same stages, but a step is measured, not run so often."""
    yield from (
        "",
        f"{PREVIEW} steps with guidance, minutes, extrapolated from these: {PREVIEW} times two of the steps above,",
    )
    yield from ("or, with `--fast`, half as many, and each of the other stages once:", "")
    yield from ("| engine | precision | video | all steps | half of them forecast |", "| --- " * 5 + "|")
    for name, found in results["parts"].items():
        if name.startswith("video "):
            step = 2 * found["seconds"]["run transformer"] / STEPS
            rest = found["whole"] - found["seconds"]["run transformer"]
            minutes = [(rest + PREVIEW / share * step) / 60 for share in (1, FORECAST)]
            yield f"| {' | '.join(named(name))} | {minutes[0]:.0f} | {minutes[1]:.0f} |"


def named(name: str) -> tuple[str, str, str]:
    """Return engine, precision and shape of a video's part."""
    _, engine, rest = name.split(" ", 2)
    precision, _, shape = rest.rpartition(" ")
    return engine, precision, shape


def video_row(name: str, found: dict[str, Any]) -> str:
    """Return the row of a video."""
    seconds = found["seconds"]
    text = sum(value for stage, value in seconds.items() if "text_encoder" in stage)
    loading = sum(seconds.get(stage, 0.0) for stage in ("load transformer", "load modulation"))
    steps = sum(seconds.get(stage, 0.0) for stage in ("run transformer", "run modulation"))
    vae = sum(value for stage, value in seconds.items() if "vae" in stage)
    times = (text, loading, steps, vae, found["whole"])
    sizes = (found["peak_private_bytes"], found["peak_resident_bytes"])
    cells = [*named(name), *(f"{each:.0f} s" for each in times), *map(size_text, sizes)]
    return f"| {' | '.join(cells)} |"


def depth_row(name: str, found: dict[str, Any]) -> str:
    """Return the row of a precision."""
    _, engine, precision = name.split(" ")
    blocks = found["blocks"]
    shown = [blocks[min(place, len(blocks)) - 1] for place in (1, 8, 16, 24, 32, 42)]
    cells = [*shown, found["noise_pred"], found["prompt_embeds"], found["frames"]]
    return f"| {engine} | {precision} | {' | '.join(f'{each:.1e}' for each in cells)} |"


def main() -> None:
    """Read the command line, and measure what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="a folder with 55 GB of room")
    parser.add_argument("--model", default="5b")
    parser.add_argument(
        "--part", action="append", help="measure this part anew; again for more; default: what is missing"
    )
    parser.add_argument("--list", action="store_true", help="name the parts, and do no more")
    parser.add_argument("--note", default="nothing else ran", help="what else used the machine, for the report")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "full_size")
    arguments = parser.parse_args()
    known = parts(arguments.work, arguments.model)
    if arguments.list:
        print("\n".join(known))
        return
    kept = arguments.output.with_suffix(".json")
    results: dict[str, Any] = {"parts": {}}
    if kept.exists():
        results["parts"] = json.loads(kept.read_text(encoding="utf-8"))["parts"]
    for name in arguments.part or [name for name in known if name not in results["parts"]]:
        print(name, file=sys.stderr)
        results["parts"][name] = known[name]() | {"note": arguments.note}
        results["parts"] = {each: results["parts"][each] for each in known if each in results["parts"]}
        write(
            arguments.output, conditions(("onnxruntime", "openvino", "torch", "diffusers"), ""), results, lines(results)
        )


if __name__ == "__main__":
    main()
