"""Measure what `cvx-deploy plan` predicts: memory of compiled plans and of ONNX Runtime's sessions.

    python benchmarks/plan_memory.py --work DIR [--output benchmarks/results/plan_memory]

`DIR` keeps checkpoints (tiny ones, and the published 5b width in two blocks) and bundles: 6 GB. Engines are compiled
ahead of time with TensorRT for RTX, which needs no GPU; every session has a process of its own.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from architecture import architecture_of
from msgspec import convert
from report import conditions, write

from cvx_deploy.bundle.opened import Bundle
from cvx_deploy.engines.onnxruntime.backend import OrtBackend
from cvx_deploy.engines.onnxruntime.graphs import graph_for_cpu
from cvx_deploy.engines.tensorrt.store import EngineStore
from cvx_deploy.estimate.memory import cpu_peak, gpu_needs
from cvx_deploy.families.cogvideox.architecture import Architecture
from cvx_deploy.measure.memory import MemoryWatch
from cvx_deploy.pipeline import vae
from cvx_deploy.shape import Shape

TOOLS = ("onnxruntime", "tensorrt-rtx-cu13", "torch", "diffusers", "onnx")
PROGRAM = (sys.executable, "-m", "cvx_deploy")
TARGET = "sm89"
BUILT = ("49x480x720", "17x256x384")
# Checkpoint, shape, network and batch of every session.
SESSIONS = (
    ("5b-tiny", "9x80x112", "text_encoder", 1),
    ("5b-tiny", "9x80x112", "transformer", 2),
    ("5b-tiny", "9x80x112", "vae_decoder", 1),
    ("2b-tiny", "17x80x112", "transformer", 2),
    ("2b-tiny", "17x80x112", "vae_decoder", 1),
    ("5b-wide", "9x192x192", "transformer", 2),
    ("5b-wide", "9x384x384", "transformer", 1),
    ("5b-wide", "9x384x384", "transformer", 2),
    ("5b-wide", "17x624x640", "transformer", 1),
    ("5b-wide", "17x624x640", "transformer", 2),
    ("5b-wide", "9x96x128", "text_encoder", 1),
    ("5b-wide", "9x96x128", "modulation", 1),
    ("5b-wide", "9x96x128", "vae_decoder", 1),
    ("5b-wide", "9x192x256", "vae_decoder", 1),
    ("5b-wide", "17x96x128", "vae_decoder", 1),
)


def checkpoint(work: Path, name: str) -> Path:
    """Return a checkpoint of random weights such as 5b-wide, made unless it is there."""
    place = work / name
    if not place.exists():
        model, scale = name.split("-")
        program("synth", "--like", model, "--scale", scale, "--output", place)
    return place


def bundle(work: Path, name: str, shapes: tuple[str, ...], precision: str) -> Path:
    """Return a bundle of a checkpoint, made unless it is there."""
    place = work / f"{name}-{precision}-{'+'.join(shapes)}"
    if not place.exists():
        sizes = [word for shape in shapes for word in ("--shape", shape)]
        words = ["--model", name, "--checkpoint", checkpoint(work, name), "--precision", precision, *sizes]
        program("export", *words, "--output", place)
    return place


def program(*words: object) -> None:
    """Run cvx-deploy."""
    subprocess.run([*PROGRAM, *map(str, words), "--quiet"], check=True, stdout=sys.stderr)


def engines(work: Path, shape: str) -> Iterator[dict[str, Any]]:
    """Build the wide 5b, its transformer for one sample too, and yield what the compiler says of each network."""
    place = bundle(work, "5b-wide", (shape,), "bf16")
    for batch, only in ((2, ()), (1, ("--network", "transformer"))):
        command = [*PROGRAM, "build", "--bundle", str(place), "--engine", "tensorrt-rtx", "--target", TARGET, *only]
        command += ["--batch", str(batch), "--json", "--quiet"]
        built = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)["engines"]
        store = EngineStore(Bundle.open(place))
        for record in store.records():
            if any(record.file.path == engine["file"] for engine in built):
                (plan,) = store.plans(record)
                measured = {"weights": plan.weights_bytes, "activations": plan.activation_bytes}
                yield {"network": record.network, "shape": shape, "batch": batch, **measured}


def session(folder: Path, network: str, batch: int) -> int:
    """Load and run one network in this process, and return the most memory that took, mapped weights left out.

    The VAE decodes twice, as in a run of two videos.
    """
    opened = Bundle.open(folder)
    latents = (opened.shape.height // 8, opened.shape.width // 8)
    rng, sizes = np.random.default_rng(0), {"batch": batch, "latent_height": latents[0], "latent_width": latents[1]}
    backend = OrtBackend(opened)
    # A graph is made anew when it is loaded; the libraries for that take some MB, whatever the network is.
    graph_for_cpu(opened.onnx_bytes("transformer"), opened.network("transformer"), sizes)
    with MemoryWatch(interval=0.005) as before:
        time.sleep(0.05)
    with MemoryWatch(interval=0.005) as watch:
        if network == "vae_decoder":
            frames = -(-opened.shape.frames // 4)
            noise = rng.standard_normal((1, 16, frames, *latents), np.float32)
            for _ in range(2):  # a memory pattern, where there is one, is laid out after the first
                for piece in vae.decode(backend, noise, tiled=False, advance=lambda _: None):
                    del piece
        else:
            specs = opened.network(network).inputs
            with backend.load(network, sizes) as loaded:
                loaded.run({spec.name: made(rng, spec.resolve(sizes), spec.dtype) for spec in specs})
    return watch.private_bytes - before.private_bytes


def made(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> Any:
    """Return an input."""
    return rng.integers(0, 200, shape) if dtype == "int64" else rng.standard_normal(shape, np.float32).astype(dtype)


def sessions(work: Path) -> Iterator[dict[str, Any]]:
    """Measure every session in a process of its own."""
    for name, shape, network, batch in SESSIONS:
        words = ["--session", str(bundle(work, name, (shape,), "fp32")), network, str(batch)]
        done = subprocess.run([sys.executable, __file__, *words], check=True, stdout=subprocess.PIPE, text=True)
        found = {"checkpoint": name, "shape": shape, "network": network, "batch": batch, "peak": int(done.stdout)}
        print(found, file=sys.stderr)
        yield found


def table(results: dict[str, Any]) -> Iterator[str]:
    """Lay the measurements beside the predictions, as lines of Markdown."""
    yield from (
        "# What cvx-deploy plan predicts, and what was measured",
        "",
        "Compiled plans, two 5b blocks, bf16:",
        "",
    )
    yield from ("| network | shape | batch | activations | predicted | |", "| --- " * 6 + "|")
    for row in results["engines"]:
        if (predicted := predicted_activations(results, row)) is not None:
            yield line([row["network"], row["shape"], row["batch"]], row["activations"], predicted)
    yield from ("", "ONNX Runtime on a CPU, fp32, host memory without mapped weights:", "")
    yield from ("| checkpoint | network | shape | batch | peak | predicted | |", "| --- " * 7 + "|")
    for row in results["sessions"]:
        name = [row["checkpoint"], row["network"], row["shape"], row["batch"]]
        yield line(name, row["peak"], predicted_peak(results, row))


def line(name: list[Any], measured: int, predicted: int) -> str:
    """Return a row: what was measured, what was predicted, and how far that is off."""
    cells = [*map(str, name), *(f"{size / 1e6:,.1f} MB" for size in (measured, predicted))]
    return f"| {' | '.join(cells)} | {(predicted / measured - 1) * 100:+.0f}% |"


def predicted_activations(results: dict[str, Any], row: dict[str, Any]) -> int | None:
    """Return what is predicted for an engine; None for networks that no figure is predicted for by itself."""
    network = {"vae_decoder_first": "vae_decoder"}.get(row["network"], row["network"])
    known = convert(results["architectures"]["5b-wide"], Architecture)
    needs = dict(gpu_needs(known, Shape.parse(row["shape"]), "bf16", "bf16", row["batch"]))
    return needs[network].activations if network in needs else None


def predicted_peak(results: dict[str, Any], row: dict[str, Any]) -> int:
    """Return what is predicted for a session."""
    known = convert(results["architectures"][row["checkpoint"]], Architecture)
    return dict(cpu_peak(known, Shape.parse(row["shape"]), row["batch"]))[row["network"]]


def main() -> None:
    """Read the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="a folder with 6 GB of room")
    parser.add_argument("--note", default="nothing else ran", help="what else used the machine, for the report")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "plan_memory")
    parser.add_argument("--session", nargs=3, metavar=("BUNDLE", "NETWORK", "BATCH"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.session:
        folder, network, batch = arguments.session
        print(session(Path(folder), network, int(batch)))
        return
    told = conditions(TOOLS, arguments.note, gpu="none: engines are compiled ahead of time, not run", target=TARGET)
    names = dict.fromkeys(name for name, *_ in SESSIONS)
    results: dict[str, Any] = {
        "architectures": {name: asdict(architecture_of(checkpoint(arguments.work, name))) for name in names},
        "engines": [row for shape in BUILT for row in engines(arguments.work, shape)],
        "sessions": list(sessions(arguments.work)),
    }
    write(arguments.output, told, results, table(results))


if __name__ == "__main__":
    main()
