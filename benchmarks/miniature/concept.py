"""Teach `mini` a colour that it has never seen, with the recipe of examples/finetune, and score it before and after.

    python benchmarks/miniature/concept.py --work DIR [--steps N] [--count N] [--output FILE]

The dataset has pink shapes and, so that the old colours stay, as many scenes of the training set. The loop is a user's:
the dataset is checked, prepared by the engines, trained on, exported with the adapter and run on ONNX Runtime. It can
be stopped and run again at any time.
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
from judge import verdict_on
from score import Sampling, Share, held_out_examples, videos_from_bundle
from validate import bundle_of
from world import COLOURS, Scene, random_scenes

from cvx_deploy.measure.conditions import conditions
from cvx_deploy.miniatures import miniature

NAME, RGB = "pink", (0.93, 0.14, 0.52)
TOKENS = 24  # a word that the tokenizer does not know takes a token a letter
_CLIPS = 128
_SEED = 26
_SCALE = 2.0  # of guidance, mini's default


def as_concept(scene: Scene, rng: np.random.Generator) -> Scene:
    """Return a scene in the new colour."""
    tint = np.clip(np.asarray(RGB) + rng.uniform(-0.05, 0.05, 3), 0, 1)
    return replace(scene, colour=NAME, tint=tuple(tint.tolist()))


def concept_scenes(split: str, count: int) -> list[Scene]:
    """Draw scenes in the new colour, of combinations that the split has in other colours."""
    rng = np.random.default_rng((_SEED, len(split)))
    scenes = random_scenes((_SEED, len(split), 1), count, "train" if split == "train" else "held-out")
    return [as_concept(scene, rng) for scene in scenes]


def lesson() -> tuple[list[Scene], list[str]]:
    """Return the scenes of the dataset, in the new colour and in the old ones, and their captions."""
    scenes = [*concept_scenes("train", _CLIPS), *random_scenes((_SEED, 2), _CLIPS, "train")]
    return scenes, captions_of(scenes, (_SEED, 3))


def score_scenes(bundle: Path, scenes: list[Scene], captions: list[str], sampling: Sampling) -> dict[str, Any]:
    """Return the share of videos that show a scene's shape, colour and motion, and of each alone."""
    videos = videos_from_bundle(bundle, captions, None, sampling)
    colours = COLOURS | {NAME: RGB}
    seen = [verdict_on(video, colours) for video in videos]
    names = ("shape", "colour", "motion")
    right = np.array([[getattr(v, n) == getattr(s, n) for n in names] for v, s in zip(seen, scenes, strict=True)])
    shares = {name: Share(int(column.sum()), len(scenes)) for name, column in zip(names, right.T, strict=True)}
    shares["all"] = Share(int(right.all(axis=1).sum()), len(scenes))
    return {name: {"right": share.right, "total": share.total, "share": share.share} for name, share in shares.items()}


def scores(bundle: Path, new_count: int, old_count: int, sampling: Sampling) -> dict[str, Any]:
    """Score a bundle on held-out captions of the new colour and of the old ones."""
    new = concept_scenes("held-out", new_count)
    old, old_captions = held_out_examples(old_count)
    return {
        "new": score_scenes(bundle, new, captions_of(new, (_SEED, 4)), sampling),
        "old": score_scenes(bundle, old, old_captions, sampling),
    }


def main() -> None:
    """Read the command line, and do what is not done yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of dataset, cache and run")
    parser.add_argument("--steps", type=int, default=1200, help="training steps")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate")
    parser.add_argument("--new-count", type=int, default=100, help="held-out captions of the new colour")
    parser.add_argument("--old-count", type=int, default=200, help="held-out captions of the old ones")
    parser.add_argument("--sampling-steps", type=int, default=50)
    parser.add_argument("--output", type=Path, help="write the result as JSON to this file")
    given = parser.parse_args()
    work, mini = given.work, miniature("mini")
    cache = prepared_cache(work, *lesson(), TOKENS)
    how = Training(steps=given.steps, batch=given.batch, rank=8, learning_rate=given.rate, save_every=25)
    began = time.process_time()
    run = train(mini, cache, work / "concept", how, load=with_padding)
    seconds = time.process_time() - began
    print(f"trained in {seconds:.0f} s of this process's CPU", flush=True)
    bundle_of(mini, run.exported, "lora", work / "concept-bundle")
    found = {}
    for which, bundle in (("before", mini), ("after", work / "concept-bundle")):
        sampling = Sampling(steps=given.sampling_steps, guidance_scale=_SCALE)
        found[which] = scores(bundle, given.new_count, given.old_count, sampling)
        print(which, json.dumps(found[which]), flush=True)
    if given.output:
        result = conditions(
            ("torch", "diffusers", "peft", "onnxruntime"),
            "other work on the same cores",
            training=asdict(how),
            clips=2 * _CLIPS,
            cpu_seconds_since_it_was_resumed=round(seconds),
            sampling_steps=given.sampling_steps,
            guidance_scale=_SCALE,
            seeds="0, 1, 2 and so on, by caption",
            **found,
        )
        given.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
