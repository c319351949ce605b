"""Train the miniature's VAE: single frames first, then clips, small before full size.

    python benchmarks/miniature/train_vae.py --state DIR [--steps N] [--data-seed N]

Stop it at any time: the same command resumes to the bit from `DIR`.
"""

import argparse
import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLCogVideoX
from diffusers.models.autoencoders.autoencoder_kl_cogvideox import CogVideoXCausalConv3d, CogVideoXSpatialNorm3D
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (torch's own name for it)
from training import Rhythm, Run, train
from world import FRAMES, SIDE, random_scenes, video_of, videos_of

KL_WEIGHT = 1e-4
SHAPE_WEIGHT = 4.0
WARM_UP = 100


@dataclass(frozen=True)
class Stage:
    """One part of the curriculum.

    Attributes:
        until: The step at which it ends.
        frames: 1 for single frames, else the frames of a clip.
        crop: Side of the square that is cut out of the video, in pixels.
        batch: Videos a step.
        learning_rate: AdamW's.
        encoder: Whether the encoder learns, too; once it does not, latents are settled and the transformer can begin.
        falls: Whether the learning rate falls to zero in a straight line until the stage ends.
    """

    until: int
    frames: int
    crop: int
    batch: int
    learning_rate: float
    encoder: bool = True
    falls: bool = False

    def rate(self, step: int, began: int) -> float:
        """Warm up again in each stage: AdamW has not met the gradients of a new kind of batch.

        Without it the kernels' past, which single frames never touch, moves by whole learning rates at once and undoes
        thousands of steps (seen: 25 dB fell to 21).
        """
        fall = (self.until - step) / (self.until - began) if self.falls else 1.0
        return self.learning_rate * min(1.0, (step - began + 1) / WARM_UP, fall)


CURRICULUM = (
    Stage(until=850, frames=1, crop=SIDE, batch=16, learning_rate=2e-3),
    Stage(until=1_200, frames=FRAMES, crop=32, batch=4, learning_rate=5e-4),
    Stage(until=2_350, frames=FRAMES, crop=SIDE, batch=4, learning_rate=5e-4, encoder=False),
    Stage(until=4_500, frames=FRAMES, crop=SIDE, batch=4, learning_rate=4e-4, encoder=False, falls=True),
)


def new_vae(block_out_channels: tuple[int, ...] = (16, 32, 48, 64)) -> AutoencoderKLCogVideoX:
    """Make the VAE with its starting weights, drawn from torch's global generator.

    SpatialNorm starts as plain GroupNorm (its factor at one), and each causal convolution looks at the present frame
    only, so that what is learned on single frames holds when clips begin.
    """
    vae = AutoencoderKLCogVideoX(
        block_out_channels=block_out_channels,
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=8,
        sample_height=SIDE,
        sample_width=SIDE,
    )
    with torch.no_grad():
        for module in vae.modules():
            if isinstance(module, CogVideoXCausalConv3d) and module.time_kernel_size > 1:
                module.conv.weight[:, :, :-1] = 0
                module.conv.weight[:, :, -1] *= 3**0.5
            if isinstance(module, CogVideoXSpatialNorm3D):
                module.conv_y.conv.weight *= 0.1
                module.conv_y.conv.bias.fill_(1)
                module.conv_b.conv.weight *= 0.1
                module.conv_b.conv.bias.zero_()
    return vae


def _convolve_one_frame(
    layer: CogVideoXCausalConv3d, x: Tensor, conv_cache: Tensor | None = None
) -> tuple[Tensor, None]:
    conv: nn.Conv3d = layer.conv
    return F.conv2d(x[:, :, 0], conv.weight[:, :, -1], conv.bias, padding=conv.padding[1:])[:, :, None], None


@contextmanager
def single_frames() -> Iterator[None]:
    """Compute single frames in two dimensions: exact while the kernels' past is zero, and a third of the work."""
    kept = CogVideoXCausalConv3d.forward
    CogVideoXCausalConv3d.forward = _convolve_one_frame
    try:
        yield
    finally:
        CogVideoXCausalConv3d.forward = kept


def batch_of(stage: Stage, data_seed: int, step: int) -> Tensor:
    """Draw the videos of one step: (B, C, T, H, W) in [-1, 1]."""
    scenes = random_scenes((data_seed, step), stage.batch, "train")
    rng = np.random.default_rng((data_seed, step, 1))
    clips = []
    for scene in scenes:
        clip = video_of(scene)
        if stage.frames == 1:
            clip = clip[rng.integers(len(clip))][None]
        top, left = rng.integers(SIDE - stage.crop + 1, size=2)
        clips.append(clip[:, top : top + stage.crop, left : left + stage.crop])
    return to_tensor(np.stack(clips))


def to_tensor(videos: np.ndarray) -> Tensor:
    """Turn (B, T, H, W, C) in [0, 1] into (B, C, T, H, W) in [-1, 1]."""
    return torch.from_numpy(videos).permute(0, 4, 1, 2, 3).contiguous() * 2 - 1


def shape_weights(videos: Tensor) -> Tensor:
    """Weigh pixels near a shape `1 + SHAPE_WEIGHT`, others 1; shapes are what is coloured, backgrounds are gray."""
    chroma = videos.amax(1, keepdim=True) - videos.amin(1, keepdim=True)
    near = F.max_pool3d((chroma > 0.1).float(), (1, 5, 5), stride=1, padding=(0, 2, 2))
    return 1 + SHAPE_WEIGHT * near


def vae_loss(vae: AutoencoderKLCogVideoX, videos: Tensor, noise: torch.Generator, encoder: bool = True) -> Tensor:
    """Weighted squared and absolute error of the reconstruction, and a little KL divergence."""
    with torch.set_grad_enabled(encoder):
        posterior = vae.encode(videos).latent_dist
    error = vae.decode(posterior.sample(noise)).sample - videos
    weights = shape_weights(videos)
    reconstruction = (weights * (error.square() + 0.2 * error.abs())).sum() / (weights.sum() * error.shape[1])
    kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
    return reconstruction + KL_WEIGHT * kl


def psnr(vae: AutoencoderKLCogVideoX, count: int = 16, frames: int = FRAMES) -> float:
    """Mean PSNR in dB of the reconstruction of held-out clips, from the posterior's mode, clipped to [0, 1]."""
    videos = to_tensor(videos_of(random_scenes((777,), count, "held-out"))[:, :frames])
    with torch.no_grad():
        decoded = [vae.decode(vae.encode(clip).latent_dist.mode()).sample for clip in videos.split(4)]
    error = (torch.cat(decoded).clamp(-1, 1) - videos) / 2
    return float((-10 * error.square().mean((1, 2, 3, 4)).log10()).mean())


def stage_at(curriculum: tuple[Stage, ...], step: int) -> tuple[int, Stage]:
    """Find the stage of a step, and the step at which that stage began."""
    began = 0
    for stage in curriculum:
        if step < stage.until:
            return began, stage
        began = stage.until
    raise ValueError(f"step {step} is past the end of the curriculum")


def settle_encoder(run: Run) -> None:
    """Give the encoder its averaged weights for good."""
    with torch.no_grad():
        for name, p in run.network.named_parameters():
            if name.startswith("encoder."):
                p.copy_(run.average[name])


def train_vae(
    vae: AutoencoderKLCogVideoX,
    state: Path,
    steps: int,
    data_seed: int,
    curriculum: tuple[Stage, ...] = CURRICULUM,
    rhythm: Rhythm | None = None,
) -> Run:
    """Train until `steps` are done in all, or the curriculum ends; resumes from `state`."""
    run = Run(vae, torch.optim.AdamW(vae.parameters(), weight_decay=1e-3, betas=(0.9, 0.99), fused=True), state)
    settled_at = max((stage.until for stage in curriculum if stage.encoder), default=0)

    def do_step(step: int) -> float:
        if step == settled_at:
            settle_encoder(run)
        began, stage = stage_at(curriculum, step)
        noise = torch.Generator().manual_seed(data_seed * 1_000_003 + step)
        videos = batch_of(stage, data_seed, step)
        with single_frames() if stage.frames == 1 else nullcontext():
            loss = vae_loss(vae, videos, noise, stage.encoder)
        run.update(loss, stage.rate(step, began))
        return float(loss.detach())

    def measure() -> str:
        return f"held-out PSNR: first frames {psnr(vae, frames=1):.2f} dB, clips {psnr(vae):.2f} dB"

    train(run, min(steps, curriculum[-1].until), rhythm or Rhythm(), do_step, measure)
    return run


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--state", type=Path, required=True, help="folder of the resumable training state")
    parser.add_argument("--steps", type=int, default=CURRICULUM[-1].until, help="stop after this many steps in all")
    parser.add_argument("--data-seed", type=int, default=0, help="seed of the training videos")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    torch.manual_seed(0)
    train_vae(new_vae(), arguments.state, arguments.steps, arguments.data_seed)


if __name__ == "__main__":
    main()
