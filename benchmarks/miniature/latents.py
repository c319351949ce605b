"""Encode the training clips once, in chunks that lie beside the training state, so that the transformer reads latents.

    python benchmarks/miniature/latents.py --vae-state DIR --output DIR [--chunks N] [--data-seed N]

A chunk that is there already is kept.
"""

import argparse
from dataclasses import dataclass
from itertools import count, takewhile
from pathlib import Path

import torch
from diffusers import AutoencoderKLCogVideoX
from safetensors.torch import load_file, save_file
from torch import Tensor
from train_vae import new_vae, to_tensor
from training import load_average
from world import Scene, random_scenes, videos_of

CHUNK = 512
_BATCH = 8


@dataclass(frozen=True)
class Latents:
    """Encoded clips, channels first, unscaled: the mean and deviation of the posterior of each.

    Attributes:
        clips: (N, 2C, T, H, W) float32: mean and log-variance, side by side, of the whole clips.
        images: (N, 2C, 1, H, W), likewise, of their first frames alone, as image-to-video encodes them.
        scenes: What they show.
    """

    clips: Tensor
    images: Tensor
    scenes: list[Scene]

    def scaling_factor(self) -> float:
        """One over the standard deviation of the clips' latents: what the transformer sees has unit variance."""
        mean, logvar = self.clips.chunk(2, dim=1)
        return float(1 / (mean.var() + logvar.exp().mean()).sqrt())


def scenes_of(data_seed: int, chunk: int) -> list[Scene]:
    """List the scenes of one chunk."""
    return random_scenes((data_seed, chunk, 2), CHUNK, "train")


def encode_chunk(vae: AutoencoderKLCogVideoX, data_seed: int, chunk: int) -> dict[str, Tensor]:
    """Encode one chunk of clips and their first frames."""
    videos = to_tensor(videos_of(scenes_of(data_seed, chunk)))
    with torch.no_grad():
        clips = [vae.encode(part).latent_dist.parameters for part in videos.split(_BATCH)]
        images = [vae.encode(part[:, :, :1]).latent_dist.parameters for part in videos.split(_BATCH)]
    return {"clips": torch.cat(clips).half(), "images": torch.cat(images).half()}


def _file(folder: Path, chunk: int) -> Path:
    return folder / f"chunk-{chunk:04d}.safetensors"


def load_latents(folder: Path, data_seed: int) -> Latents:
    """Load the chunks of `folder`; those after a gap are left out."""
    there = list(takewhile(Path.exists, (_file(folder, chunk) for chunk in count())))
    parts = [load_file(path) for path in there]
    return Latents(
        clips=torch.cat([part["clips"] for part in parts]).float(),
        images=torch.cat([part["images"] for part in parts]).float(),
        scenes=[scene for chunk in range(len(there)) for scene in scenes_of(data_seed, chunk)],
    )


def write_latents(vae: AutoencoderKLCogVideoX, folder: Path, data_seed: int, chunks: int) -> None:
    """Encode those of the first `chunks` chunks that `folder` lacks."""
    folder.mkdir(parents=True, exist_ok=True)
    for chunk in range(chunks):
        path = _file(folder, chunk)
        if not path.exists():
            partial = path.with_suffix(".partial")
            save_file(encode_chunk(vae, data_seed, chunk), partial)
            partial.replace(path)


def main() -> None:
    """Read the command line and encode."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vae-state", type=Path, required=True, help="state folder of train_vae.py")
    parser.add_argument("--output", type=Path, required=True, help="folder of the chunks")
    parser.add_argument("--chunks", type=int, default=16, help=f"chunks of {CHUNK} clips in all")
    parser.add_argument("--data-seed", type=int, default=0, help="seed of the training videos")
    arguments = parser.parse_args()
    vae = new_vae()
    load_average(vae, arguments.vae_state)
    write_latents(vae, arguments.output, arguments.data_seed, arguments.chunks)


if __name__ == "__main__":
    main()
