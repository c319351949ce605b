"""Write a checkpoint in diffusers layout from the training states: weights, tokenizer, scheduler, model card.

python benchmarks/miniature/assemble.py --vae-state DIR --state DIR --latents DIR --output DIR [--score FILE]
"""

import argparse
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXImageToVideoPipeline, CogVideoXPipeline
from latents import load_latents
from text import load_tokenizer
from train_transformer import Size, Task, TextToLatents, new_scheduler
from train_vae import new_vae, psnr
from training import load_average
from world import BACKGROUNDS, COLOURS, FPS, FRAMES, MOTIONS, SHAPES, SIDE, combinations

_CARD = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: {task}
---
# CogVideoX miniature, {task}

A CogVideoX of {millions:.1f} million parameters, trained from scratch on a procedural world, to test compilers,
samplers and quantization on something that can be judged. It makes {frames} frames of {side}x{side} pixels at {fps}
frames a second.

- **Data**: drawn by formula, no pictures or texts of others. One shape ({shapes}) in one colour ({colours}) on a plain
  or softly graded background ({backgrounds}), with one motion ({motions}); captions from a small grammar. {held_out} of
  {combinations} combinations of shape, colour and motion were never trained on.
- **Training**: VAE {vae_steps} steps; {learned} {steps} steps, v-prediction, zero terminal SNR, captions dropped in
  10% of the examples; averaged weights. The code is in `benchmarks/miniature/`.
- **Figures**: VAE reconstruction of held-out clips {psnr:.2f} dB.{score}
- **Limits**: it knows this world and its words only.
"""


_LEARNED: dict[Task, str] = {
    "text-to-video": "text encoder and transformer together",
    "image-to-video": "from the text-to-video miniature, whose text encoder it keeps, the transformer",
}


@dataclass(frozen=True)
class Parts:
    """The folders a checkpoint is made from.

    Attributes:
        vae_state: State of `train_vae.py`.
        state: State of `train_transformer.py`.
        latents: Chunks of `latents.py`, for the scaling factor; one is enough only if training had one.
        tokenizer: The tokenizer the transformer was trained with.
        score: What `score.py --output` wrote for an earlier assembly of the same states, for the card.
    """

    vae_state: Path
    state: Path
    latents: Path
    tokenizer: Path
    score: Path | None = None


def assemble(task: Task, parts: Parts, scaling_factor: float, output: Path, size: Size | None = None) -> None:
    """Write the checkpoint to `output`, which may exist."""
    tokenizer = load_tokenizer(parts.tokenizer)
    network = TextToLatents(task, size or Size(), len(tokenizer))
    vae = new_vae()
    steps, vae_steps = load_average(network, parts.state), load_average(vae, parts.vae_state)
    vae.register_to_config(scaling_factor=scaling_factor)
    kind = CogVideoXPipeline if task == "text-to-video" else CogVideoXImageToVideoPipeline
    pipeline = kind(
        tokenizer=tokenizer,
        # Transformers loads weights in the type they are stored in, diffusers in fp32 unless told otherwise: stored in
        # fp32, the small text encoder agrees with the others for those who say nothing.
        text_encoder=network.text_encoder,
        vae=vae.half(),
        transformer=network.finished_transformer().half(),
        scheduler=new_scheduler(),
    )
    pipeline.save_pretrained(output)
    shutil.copy(parts.tokenizer / "spiece.model", output / "tokenizer" / "spiece.model")
    (output / "tokenizer" / "tokenizer.json").unlink()  # made from the other; published checkpoints have that alone
    weights = sum(p.numel() for part in (network.text_encoder, network.transformer, vae) for p in part.parameters())
    (output / "README.md").write_text(_card(task, output, weights, (vae_steps, steps), parts.score))


def _card(task: Task, checkpoint: Path, weights: int, steps: tuple[int, int], score: Path | None) -> str:
    """Fill in the model card; the VAE's figure is measured on the fp16 weights as they were written."""
    vae = AutoencoderKLCogVideoX.from_pretrained(checkpoint / "vae")
    return _CARD.format(
        task=task,
        learned=_LEARNED[task],
        millions=weights / 1e6,
        frames=FRAMES,
        side=SIDE,
        fps=FPS,
        shapes=", ".join(SHAPES),
        colours=", ".join(COLOURS),
        backgrounds=", ".join(BACKGROUNDS),
        motions=", ".join(MOTIONS),
        held_out=len(combinations("held-out")),
        combinations=len(combinations("held-out")) + len(combinations("train")),
        vae_steps=steps[0],
        steps=steps[1],
        psnr=psnr(vae, count=64),
        score="" if score is None else _score_sentence(score),
    )


def _score_sentence(path: Path) -> str:
    """Say what `score.py` measured, with its conditions."""
    measured = json.loads(path.read_text())
    conditions = measured["conditions"]
    shares = ", ".join(f"{name} {100 * measured[name]['share']:.1f}%" for name in ("all", "shape", "colour", "motion"))
    first = measured["first_frame_psnr"]
    image = "" if first is None else f" First frame against the given image: {first:.2f} dB."
    return (
        f" Of {conditions['count']} held-out captions, {conditions['steps']} steps at guidance "
        f"{conditions['guidance_scale']:g} on {conditions['engine']}, right in {shares}.{image}"
    )


def main() -> None:
    """Read the command line and assemble."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vae-state", type=Path, required=True, help="state folder of train_vae.py")
    parser.add_argument("--state", type=Path, required=True, help="state folder of train_transformer.py")
    parser.add_argument("--latents", type=Path, required=True, help="folder of latents.py")
    parser.add_argument("--tokenizer", type=Path, help="folder of the tokenizer (default: beside the state)")
    parser.add_argument("--task", choices=("text-to-video", "image-to-video"), default="text-to-video")
    parser.add_argument("--score", type=Path, help="JSON of score.py, for the model card")
    parser.add_argument("--data-seed", type=int, default=0, help="seed of the training videos")
    parser.add_argument("--output", type=Path, required=True, help="folder to write the checkpoint to")
    arguments = parser.parse_args()
    tokenizer = arguments.tokenizer or arguments.state.parent / "tokenizer"
    parts = Parts(arguments.vae_state, arguments.state, arguments.latents, tokenizer, arguments.score)
    torch.manual_seed(0)
    factor = load_latents(parts.latents, arguments.data_seed).scaling_factor()
    assemble(arguments.task, parts, factor, arguments.output)


if __name__ == "__main__":
    main()
