"""Teach `mini` to do without guidance, with the recipe of examples/finetune, and hold the student against its teacher.

    python benchmarks/miniature/distil.py --work DIR [--guidance G] [--count N] [--output FILE]

The teacher is `mini` with guidance, the student the same network with an adapter, exported and run at scale 1 on ONNX
Runtime: one call of the transformer a step in place of two. A third row is what the student was before: `mini` at scale
1. All make videos of the judge's captions, from the same seeds. It can be stopped and run again at any time.
"""

import argparse
import json
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from captions import captions_of
from finetuned import Training, prepared_cache, train, with_padding
from numpy.typing import NDArray
from score import Sampling, held_out_examples, score, videos_from_bundle
from text import SHORT_LENGTH
from validate import bundle_of
from world import random_scenes

from cvx_deploy.measure.conditions import conditions
from cvx_deploy.miniatures import miniature

_CLIPS = 1024
_SEED = 27
Videos = NDArray[np.float32]  # (videos, frames, height, width, 3) in [0, 1]


def made(bundle: Path, captions: list[str], sampling: Sampling, kept: Path) -> tuple[Videos, float]:
    """Return a bundle's videos and the seconds of the CPU that they took; kept in a file, and made once."""
    if not kept.exists():
        began = time.process_time()
        videos = videos_from_bundle(bundle, captions, None, sampling)
        np.savez(kept, videos=videos, seconds=time.process_time() - began)
    found = np.load(kept)
    return found["videos"], float(found["seconds"])


def likeness(videos: Videos, others: Videos) -> float:
    """Return the median PSNR of videos against others from the same seeds, in dB."""
    errors = np.square(videos.astype(np.float64) - others).mean(axis=(1, 2, 3, 4))
    return float(np.median(-10 * np.log10(np.maximum(errors, 1e-12))))


def judged(found: tuple[Videos, float], teacher: Videos, captions: list[str], scale: float) -> dict[str, Any]:
    """Return one row: its score, how alike the teacher's its videos are, and what they took."""
    videos, seconds = found
    shares = score(videos, captions).to_json()
    return {
        "guidance_scale": scale,
        "transformer_samples_a_step": 1 if scale == 1 else 2,
        "right": {name: shares[name]["right"] for name in ("shape", "colour", "motion", "all")},
        "of": len(captions),
        "share_interval": shares["all"]["interval"],
        "psnr_to_teacher": None if videos is teacher else round(likeness(videos, teacher), 2),
        "cpu_seconds_a_video": round(seconds / len(captions), 3),
    }


def main() -> None:
    """Read the command line, and do what is not done yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of dataset, cache, run and videos")
    parser.add_argument("--guidance", type=float, default=2.0, help="the teacher's scale")
    parser.add_argument("--steps", type=int, default=1500, help="training steps")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--rate", type=float, default=3e-3, help="learning rate")
    parser.add_argument("--ema", type=float, help="decay of averaged weights")
    parser.add_argument("--min-snr", type=float, help="gamma of min-SNR weighting")
    parser.add_argument("--count", type=int, default=200, help="held-out captions")
    parser.add_argument("--sampling-steps", type=int, default=50)
    parser.add_argument("--name", default="student", help="of the run in the folder")
    parser.add_argument("--output", type=Path, help="write the result as JSON to this file")
    given = parser.parse_args()
    work, mini = given.work, miniature("mini")
    scenes = random_scenes((_SEED, 1), _CLIPS, "train")
    cache = prepared_cache(work, scenes, captions_of(scenes, (_SEED, 2)), SHORT_LENGTH)
    how = Training(
        steps=given.steps, batch=given.batch, rank=given.rank, learning_rate=given.rate, ema=given.ema,
        min_snr=given.min_snr, guidance=given.guidance, save_every=50,
    )  # fmt: skip
    began = time.process_time()
    run = train(mini, cache, work / given.name, how, load=with_padding)
    seconds = time.process_time() - began
    print(f"trained in {seconds:.0f} s of this process's CPU", flush=True)
    bundle = work / f"{given.name}-bundle"
    bundle_of(mini, run.exported, "lora", bundle)
    _, captions = held_out_examples(given.count)
    rows = (("teacher", mini, given.guidance), ("not distilled", mini, 1.0), ("student", bundle, 1.0))
    sampling, videos = Sampling(steps=given.sampling_steps), {}
    for name, folder, scale in rows:
        kept = f"{given.name if name == 'student' else 'mini'}-{scale:g}-{given.sampling_steps}-{given.count}.npz"
        videos[name] = made(folder, captions, replace(sampling, guidance_scale=scale), work / kept)
    teacher = videos["teacher"][0]
    found = {name: judged(videos[name], teacher, captions, scale) for name, _, scale in rows}
    print(json.dumps(found, indent=1), flush=True)
    if given.output:
        told = conditions(
            ("torch", "diffusers", "peft", "onnxruntime"),
            "other work on the same cores",
            training=asdict(how),
            clips=_CLIPS,
            cpu_seconds_since_it_was_resumed=round(seconds),
            sampling_steps=given.sampling_steps,
            seeds=f"0 to {given.count - 1}",
        )
        given.output.write_text(json.dumps({"conditions": told, "rows": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
