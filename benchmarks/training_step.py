"""What a training step takes, measured and counted, beside what `cvx-deploy plan --train` says of it.

    python benchmarks/training_step.py --work DIR [--output benchmarks/results/training_step]

Counted are blocks of the published models, of fake tensors (`training_bytes.py`). Measured are two steps of the
published 5b width in two blocks, random latents, on the CPU; every way has a process of its own, and its memory is the
growth of the largest resident set over what the imports took. What is done is kept in DIR, and the command goes on
where it was stopped; the page is written after counting, and again after measuring.
"""

import argparse
import importlib.util
import json
import multiprocessing
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from architecture import architecture_of
from diffusers import CogVideoXDDIMScheduler
from report import conditions, write

from cvx_deploy.estimate.training import Method, Way, training_needs
from cvx_deploy.exporters.sources.synth_configs import transformer_config
from cvx_deploy.families.cogvideox.architecture import Architecture
from cvx_deploy.families.cogvideox.models import MODELS
from cvx_deploy.shape import Shape

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "finetune"))
from objective import Objective
from state import Training
from train import make_trainable, new_optimizer, transformer_of
from training_bytes import counted, random_batch, take_step

RANK = 64
METHODS: tuple[Method, ...] = ("lora", "full")
MEASURED = (
    ("9x96x128", Way("lora")),
    ("9x96x128", Way("lora", checkpointing=False)),
    ("9x96x128", Way("full")),
    ("9x96x128", Way("full", eight_bit=True)),
    ("17x192x256", Way("lora")),
)
COUNTED = tuple(
    (name, blocks, shape, Way(method, checkpointing=checkpointing))
    for name, shapes in (("5b", ("17x256x384", "49x480x720")), ("2b", ("17x256x384",)))
    for shape in shapes
    for blocks in (2, 4)
    for method in METHODS
    for checkpointing in (True, False)
)
Row = dict[str, Any]


def training(way: Way) -> Training:
    """Return the settings of train.py for a way."""
    return Training(
        method=way.method, precision="bf16", checkpointing=way.checkpointing, eight_bit=way.eight_bit, rank=RANK
    )


def measured(checkpoint: Path, shape: Shape, way: Way, file: Path) -> None:
    """Take two steps, and write what they took to a file; the second one is timed, by the CPU."""
    how, began_with = training(way), _peak()
    transformer = transformer_of(checkpoint, torch.bfloat16 if how.method == "lora" else torch.float32)
    transformer.train()
    parameters = make_trainable(transformer, how)
    optimizer = new_optimizer(parameters, how)
    scheduler = CogVideoXDDIMScheduler.from_pretrained(checkpoint, subfolder="scheduler")
    objective = Objective(scheduler, transformer.config, None, None)
    batch, seconds = random_batch(transformer.config, shape), 0.0
    for _ in range(2):
        began = time.process_time()
        take_step(objective, transformer, optimizer, batch, how)
        seconds = time.process_time() - began
    found = {"bytes": _peak() - began_with, "cpu_seconds": round(seconds, 1)}
    file.write_text(json.dumps(found))


def _peak() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def planned(architecture: Architecture, shape: Shape, way: Way) -> int:
    """Return the bytes that the plan says, without those of CUDA."""
    return training_needs(architecture, shape, way, RANK).total


def measured_rows(work: Path) -> Iterator[Row]:
    """Yield what every way of `MEASURED` took."""
    checkpoint = work / "5b-wide"
    if not checkpoint.exists():
        words = ("synth", "--like", "5b", "--scale", "wide", "--output", str(checkpoint), "--quiet")
        subprocess.run([sys.executable, "-m", "cvx_deploy", *words], check=True)
    architecture = architecture_of(checkpoint)
    for name, way in MEASURED:
        if way.eight_bit and importlib.util.find_spec("bitsandbytes") is None:
            print(f"{name} {way}: left out, as bitsandbytes is not installed", flush=True)
            continue
        shape = Shape.parse(name)
        found = _kept(work / f"measured {name} {way}.json", measured, checkpoint, shape, way)
        yield _row("5b, 2 blocks", architecture, shape, way) | found


def counted_rows(work: Path) -> Iterator[Row]:
    """Yield what every way of `COUNTED` holds."""
    for name, blocks, size, way in COUNTED:
        whole, shape = Architecture.of_model(MODELS[name]), Shape.parse(size)
        architecture = replace(whole, transformer=replace(whole.transformer, layers=blocks))
        found = _kept(work / f"counted {name} {blocks} {shape} {way}.json", _count, name, blocks, shape, way)
        yield _row(f"{name}, {blocks} blocks", architecture, shape, way) | found


def _count(name: str, blocks: int, shape: Shape, way: Way, file: Path) -> None:
    config = {**transformer_config(MODELS[name], "full"), "num_layers": blocks}
    found = counted(config, shape, training(way))
    file.write_text(json.dumps({"bytes": found.peak, "between_steps": found.held}))


def _kept(file: Path, run: Callable[..., None], *given: Any) -> Row:
    """Return what is in a file, which a process of its own writes unless it is there."""
    if not file.exists():
        process = multiprocessing.get_context("spawn").Process(target=run, args=(*given, file))
        process.start()
        process.join()
        print(file.stem, file.read_text(), flush=True)
    found: Row = json.loads(file.read_text())
    return found


def _row(model: str, architecture: Architecture, shape: Shape, way: Way) -> Row:
    return {
        "model": model,
        "shape": str(shape),
        "way": str(way),
        "tokens": architecture.tokens(shape),
        "planned": planned(architecture, shape, way),
    }


def table(results: dict[str, list[Row]]) -> list[str]:
    """Return the page's lines: what was counted, and what was measured if that was done."""
    head = "| model | shape | tokens | method | {} | planned | |"
    lines = ["# What a training step takes", ""]
    lines += ["Counted on fake tensors, every storage of two steps, kernels' workspace left out:", ""]
    lines += [head.format("counted"), "| --- " * 7 + "|", *map(_line, results["counted"])]
    if measured := results.get("measured"):
        lines += ["", "Measured on a CPU, resident memory of two steps:", ""]
        lines += [head.format("measured") + " CPU seconds of a step |", "| --- " * 8 + "|"]
        lines += [_line(row) + f" {row['cpu_seconds']} |" for row in measured]
    return lines


def _line(row: Row) -> str:
    error = row["planned"] / row["bytes"] - 1
    sizes = f"{row['bytes'] / 1e9:.2f} GB | {row['planned'] / 1e9:.2f} GB | {error:+.0%}"
    return f"| {row['model']} | {row['shape']} | {row['tokens']:,} | {row['way']} | {sizes} |"


def main() -> None:
    """Read the command line, measure, count, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of the checkpoint and of what is done")
    default = Path(__file__).parent / "results" / "training_step"
    parser.add_argument("--output", type=Path, default=default, help="page and JSON, without a suffix")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    tools = ("torch", "diffusers", "peft", "accelerate", "bitsandbytes")
    said = conditions(tools, "other work on the same cores", rank=RANK, seed="random weights and latents")
    results = {"counted": list(counted_rows(given.work))}
    write(given.output, said, {"results": results}, table(results))
    results["measured"] = list(measured_rows(given.work))
    write(given.output, said, {"results": results}, table(results))


if __name__ == "__main__":
    main()
