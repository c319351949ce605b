"""One training step of a checkpoint's transformer: seconds of the CPU and peak memory, of LoRA and of all weights.

    python benchmarks/training_step.py --checkpoint DIR --shape 9x96x128 [--output FILE]

The checkpoint is best one of the real width and few blocks, such as `cvx-deploy synth --like 5b --scale wide` writes.
The steps are those of examples/finetune on random latents. Every way runs in a process of its own.
"""

import argparse
import json
import multiprocessing
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import CogVideoXDDIMScheduler

from cvx_deploy.measure.conditions import conditions
from cvx_deploy.shape import Shape

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "finetune"))
from objective import Batch, Objective
from state import Training
from train import make_trainable, new_optimizer, transformer_of

WAYS = {
    "lora": Training(precision="bf16", checkpointing=True),
    "lora, activations kept": Training(precision="bf16"),
    "full": Training(method="full", precision="bf16", checkpointing=True),
}


def measured(checkpoint: Path, shape: Shape, way: str) -> dict[str, Any]:
    """Return what two steps of a way take; the second one is timed."""
    how, held = WAYS[way], _peak()
    dtype = torch.bfloat16 if how.method == "lora" else torch.float32
    transformer = transformer_of(checkpoint, dtype)
    stored = sum(p.numel() for p in transformer.parameters())
    parameters = make_trainable(transformer, how)
    optimizer = new_optimizer(parameters, how)
    scheduler = CogVideoXDDIMScheduler.from_pretrained(checkpoint, subfolder="scheduler")
    objective = Objective(scheduler, transformer.config, None, None)
    batch, seconds = random_batch(transformer.config, shape), 0.0
    for _ in range(2):
        began = time.process_time()
        with torch.autocast("cpu", torch.bfloat16):
            loss = objective.loss(transformer, transformer, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds = time.process_time() - began
    trained = sum(p.numel() for p in parameters)
    return {
        "parameters": stored,
        "trained": trained,
        "tokens": 226 + batch.latents[0, :, 0].numel() // transformer.config.patch_size**2,
        "cpu_seconds": round(seconds, 2),
        "peak_bytes": _peak() - held,
        "least_bytes": stored * dtype.itemsize + trained * (4 * 3 if how.method == "full" else 4 * 4),
    }


def _peak() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def random_batch(config: Any, shape: Shape) -> Batch:
    """Return one clip's latents of a shape, of random numbers."""
    latents = torch.randn(1, -(-shape.frames // 4), config.out_channels, shape.height // 8, shape.width // 8)
    prompts = torch.randn(1, config.max_text_seq_length, config.text_embed_dim)
    return Batch(latents, torch.randn_like(latents), None, prompts, prompts, torch.tensor([500]))


def _into(results: Any, checkpoint: Path, shape: Shape, way: str) -> None:
    results[way] = measured(checkpoint, shape, way)


def main() -> None:
    """Read the command line, measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder in diffusers layout")
    parser.add_argument("--shape", type=Shape.parse, required=True, help="such as 9x96x128")
    parser.add_argument("--output", type=Path, help="write the result as JSON to this file")
    arguments = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager:
        results = manager.dict()
        for way in WAYS:
            process = context.Process(target=_into, args=(results, arguments.checkpoint, arguments.shape, way))
            process.start()
            process.join()
            print(way, results.get(way), flush=True)
        found = {"shape": str(arguments.shape), "seed": "random latents", "ways": dict(results)}
    if arguments.output:
        said = conditions(("torch", "diffusers", "peft", "accelerate"), "other work on the same cores", **found)
        arguments.output.write_text(json.dumps(said, indent=2) + "\n")


if __name__ == "__main__":
    main()
