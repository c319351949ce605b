"""Teach `mini` a colour that it has never seen, with the recipe of examples/finetune, and score it before and after.

    python benchmarks/miniature/concept.py --work DIR [--steps N] [--count N] [--output FILE]

The dataset has pink shapes and, so that the old colours stay, as many scenes of the training set. The loop is a user's:
the dataset is checked, prepared by the engines, trained on, exported with the adapter and run on ONNX Runtime. Only the
prompts are cut to what `text.padding_bias` allows, the same function for a sixth of the work. It can be stopped and run
again at any time. With ``--distil-guidance G`` the adapter learns to do without guidance instead.
"""

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from captions import captions_of
from diffusers import CogVideoXTransformer3DModel
from judge import verdict_on
from PIL import Image
from safetensors.torch import load_file, save_file
from score import Sampling, Share, held_out_examples, videos_from_bundle
from text import padding_bias
from world import COLOURS, Scene, random_scenes, video_of

from cvx_deploy.bundle.opened import Bundle
from cvx_deploy.measure.conditions import conditions
from cvx_deploy.miniatures import miniature

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "finetune"))
from dataset import check_dataset, require_good
from prepare import prepare
from state import Training
from train import train, transformer_of
from validate import bundle_of

NAME, RGB = "pink", (0.93, 0.14, 0.52)
_CLIPS = 128
_SEED = 26
_TOKENS = 24  # a word that the tokenizer does not know takes a token a letter


def as_concept(scene: Scene, rng: np.random.Generator) -> Scene:
    """Return a scene in the new colour."""
    tint = np.clip(np.asarray(RGB) + rng.uniform(-0.05, 0.05, 3), 0, 1)
    return replace(scene, colour=NAME, tint=tuple(tint.tolist()))


def concept_scenes(split: str, count: int) -> list[Scene]:
    """Draw scenes in the new colour, of combinations that the split has in other colours."""
    rng = np.random.default_rng((_SEED, len(split)))
    scenes = random_scenes((_SEED, len(split), 1), count, "train" if split == "train" else "held-out")
    return [as_concept(scene, rng) for scene in scenes]


def write_dataset(folder: Path) -> None:
    """Write what a user would bring: clips, as folders of frames, and captions."""
    scenes = [*concept_scenes("train", _CLIPS), *random_scenes((_SEED, 2), _CLIPS, "train")]
    lines = []
    for number, (scene, caption) in enumerate(zip(scenes, captions_of(scenes, (_SEED, 3)), strict=True)):
        clip = folder / "videos" / f"{number:03d}"
        clip.mkdir(parents=True, exist_ok=True)
        for index, frame in enumerate((video_of(scene) * 255).round().astype(np.uint8)):
            Image.fromarray(frame).save(clip / f"{index}.png")
        lines.append(json.dumps({"video": clip.name, "caption": caption}))
    (folder / "captions.jsonl").write_text("\n".join(lines) + "\n")


def shorten_prompts(cache: Path) -> None:
    """Cut cached prompts to the length that `with_padding` makes up for."""
    for path in (cache / "prompts").glob("*.safetensors"):
        embeds = load_file(path)["prompt_embeds"]
        if len(embeds) > _TOKENS:
            assert torch.equal(embeds[_TOKENS - 1 :], embeds[-1].expand(len(embeds) - _TOKENS + 1, -1)) or (
                (embeds[_TOKENS - 1 :] - embeds[-1]).abs().max() < 1e-4
            ), path
            save_file({"prompt_embeds": embeds[:_TOKENS].contiguous()}, path)


def with_padding(checkpoint: Path, dtype: torch.dtype) -> CogVideoXTransformer3DModel:
    """Load a transformer that lets the last token of a short prompt stand for all its padding."""
    transformer = transformer_of(checkpoint, dtype)

    def add_bias(_: torch.nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
        _, frames, _, height, width = given["hidden_states"].shape
        bias = padding_bias(given["encoder_hidden_states"].shape[1], frames * (height // 2) * (width // 2))
        assert bias is not None
        mask = bias[0].expand(len(given["hidden_states"]), -1, -1)
        return args, given | {"attention_kwargs": {"attention_mask": mask}}

    transformer.register_forward_pre_hook(add_bias, with_kwargs=True)
    return transformer


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


def scores(bundle: Path, count: int, sampling: Sampling) -> dict[str, Any]:
    """Score a bundle on held-out captions of the new colour and of the old ones."""
    new = concept_scenes("held-out", count)
    old, old_captions = held_out_examples(count)
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
    parser.add_argument("--distil-guidance", type=float, help="guidance scale to do without")
    parser.add_argument("--count", type=int, default=60, help="held-out captions of each kind")
    parser.add_argument("--sampling-steps", type=int, default=50)
    parser.add_argument("--output", type=Path, help="write the result as JSON to this file")
    arguments = parser.parse_args()
    work, mini = arguments.work, miniature("mini")
    if not (work / "cache" / "index.json").exists():
        write_dataset(work / "data")
        report = check_dataset(work / "data", Bundle.open(mini))
        print(report, flush=True)
        require_good(report)
        prepare(report.clips, Bundle.open(mini), Bundle.open(mini), work / "cache", "onnxruntime")
        shorten_prompts(work / "cache")
    how = Training(
        steps=arguments.steps,
        batch=arguments.batch,
        rank=8,
        learning_rate=arguments.rate,
        guidance=arguments.distil_guidance,
        save_every=25,
    )
    name = "concept" if how.guidance is None else "distilled"
    began = time.process_time()
    run = train(mini, work / "cache", work / name, how, load=with_padding)
    seconds = time.process_time() - began
    print(f"trained in {seconds:.0f} s of this process's CPU", flush=True)
    bundle_of(mini, run.exported, "lora", work / f"{name}-bundle")
    found = {}
    for which, bundle, guidance in (
        ("before", mini, how.guidance or 2.0),
        ("after", work / f"{name}-bundle", 2.0 if how.guidance is None else 1.0),
    ):
        sampling = Sampling(steps=arguments.sampling_steps, guidance_scale=guidance)
        found[which] = scores(bundle, arguments.count, sampling)
        print(which, json.dumps(found[which]), flush=True)
    if arguments.output:
        result: dict[str, Any] = {
            "training": vars(how),
            "clips": 2 * _CLIPS,
            "cpu_seconds_since_it_was_resumed": round(seconds),
            "sampling_steps": arguments.sampling_steps,
            "guidance_scale": {"before": how.guidance or 2.0, "after": 2.0 if how.guidance is None else 1.0},
            "seeds": f"0 to {arguments.count - 1}",
            **found,
        }
        result = conditions(("torch", "diffusers", "peft", "onnxruntime"), "other work on the same cores", **result)
        arguments.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
