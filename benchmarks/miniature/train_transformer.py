"""Train the miniature's text encoder and transformer together on encoded clips; image-to-video starts from `mini`.

    python benchmarks/miniature/train_transformer.py --latents DIR --state DIR [--steps N] [--data-seed N]
    python benchmarks/miniature/train_transformer.py --latents DIR --state DIR --task image-to-video --start DIR

Stop it at any time: the same command resumes to the bit from the state folder.
"""

import argparse
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from captions import captions_of
from diffusers import CogVideoXDDIMScheduler, CogVideoXTransformer3DModel
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from latents import Latents, load_latents
from text import SHORT_LENGTH, TEXT_LENGTH, encode, load_tokenizer, new_text_encoder, padding_bias, token_ids
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (torch's own name for it)
from training import Rhythm, Run, load_average, train
from transformers import T5Tokenizer
from world import COLOURS, FRAMES, MOTIONS, SHAPES, SIDE, Scene

Task = Literal["text-to-video", "image-to-video"]
LATENT_SIDE = SIDE // 8
LATENT_FRAMES = (FRAMES - 1) // 4 + 1
WARM_UP = 200
# Captions replaced by the empty one, for guidance.
DROP_CAPTION = 0.1
# Timesteps are this power of an even spread.
NOISY = 0.7
# What a caption says of its video, by attribute; the weight of the loss for knowing it halfway through the blocks.
ATTRIBUTES = {"shape": tuple(SHAPES), "colour": tuple(COLOURS), "motion": tuple(MOTIONS)}
ATTRIBUTES_WEIGHT = 0.05


@dataclass(frozen=True)
class Size:
    """How large the text encoder and the transformer are.

    Attributes:
        heads: Attention heads, each `head_dim` wide.
        layers: Transformer blocks.
        time_embed_dim: Width of the timestep embedding.
        text_width: d_model of the T5 encoder; `text_layers` its blocks.
    """

    heads: int = 4
    head_dim: int = 32
    layers: int = 8
    time_embed_dim: int = 96
    text_width: int = 64
    text_layers: int = 2


@dataclass(frozen=True)
class Plan:
    """How long to train, and on what.

    Attributes:
        steps: Steps in all.
        batch: Clips a step.
        learning_rate: AdamW's at its highest; it falls to zero over the last fifth of `steps`.
    """

    steps: int = 12_000
    batch: int = 32
    learning_rate: float = 1e-3

    def rate(self, step: int) -> float:
        """Warm up, hold, and fall in a straight line."""
        fall = (self.steps - step) / (0.2 * self.steps)
        return self.learning_rate * min(1.0, (step + 1) / WARM_UP, max(fall, 0.0))


def new_scheduler() -> CogVideoXDDIMScheduler:
    """Make CogVideoX's noise schedule: v-prediction, no signal at all in the last step."""
    return CogVideoXDDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        set_alpha_to_one=True,
        snr_shift_scale=1.0,
        timestep_spacing="trailing",
    )


def new_transformer(task: Task, size: Size, latent_channels: int) -> CogVideoXTransformer3DModel:
    """Make the transformer; blocks begin as the identity and the output as zero, as diffusion transformers do."""
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=size.heads,
        attention_head_dim=size.head_dim,
        in_channels=latent_channels * (2 if task == "image-to-video" else 1),
        out_channels=latent_channels,
        time_embed_dim=size.time_embed_dim,
        text_embed_dim=size.text_width,
        num_layers=size.layers,
        sample_width=LATENT_SIDE,
        sample_height=LATENT_SIDE,
        sample_frames=FRAMES,
        use_rotary_positional_embeddings=True,
    )
    for block in transformer.transformer_blocks:
        for norm in (block.norm1, block.norm2):
            nn.init.zeros_(norm.linear.weight)
            nn.init.zeros_(norm.linear.bias)
    nn.init.zeros_(transformer.proj_out.weight)
    nn.init.zeros_(transformer.proj_out.bias)
    return transformer


class TextToLatents(nn.Module):
    """The text encoder and the transformer as one network to train."""

    def __init__(self, task: Task, size: Size, vocabulary: int, latent_channels: int = 8) -> None:
        super().__init__()
        self.text_encoder = new_text_encoder(vocabulary, size.text_width, size.text_layers)
        self.transformer = new_transformer(task, size, latent_channels)
        if task == "image-to-video":
            # It starts from a trained text encoder, which the two models then share.
            self.text_encoder.requires_grad_(False)
            tokens = LATENT_FRAMES * (LATENT_SIDE // self.transformer.config.patch_size) ** 2
            self.positions = nn.Parameter(torch.zeros(tokens, size.heads * size.head_dim))
            self.transformer.patch_embed.register_forward_hook(self._with_positions)

        # Only training has it: every video token tells halfway what the caption said. Denoising alone takes tens of
        # thousands of steps to find out that the words for shapes and motions matter, for they move few pixels.
        self.attributes = nn.Linear(size.heads * size.head_dim, sum(map(len, ATTRIBUTES.values())))
        self._told: Tensor | None = None
        self.transformer.transformer_blocks[(size.layers - 1) // 2].register_forward_hook(self._tell)

    def _tell(self, _: nn.Module, __: tuple[Tensor, ...], states: tuple[Tensor, Tensor]) -> None:
        self._told = self.attributes(states[0])

    def attributes_loss(self, said: Tensor) -> Tensor:
        """Return the mean cross entropy of what the video tokens of the last `forward` tell, in nats.

        Args:
            said: (B, len(ATTRIBUTES)), the index of each attribute's value, or -100 where the caption does not say.
        """
        assert self._told is not None
        parts = self._told.transpose(1, 2).split([len(values) for values in ATTRIBUTES.values()], dim=1)
        tokens = self._told.shape[1]
        losses = [F.cross_entropy(part, said[:, k, None].expand(-1, tokens)) for k, part in enumerate(parts)]
        return torch.stack(losses).mean()

    def _with_positions(self, _: nn.Module, __: tuple[Tensor, ...], embeds: Tensor) -> Tensor:
        """Add the learned positions to the video's tokens, whatever the length of the text before them."""
        return embeds + F.pad(self.positions, (0, 0, embeds.shape[1] - len(self.positions), 0))

    def finished_transformer(self) -> CogVideoXTransformer3DModel:
        """Return the transformer as diffusers has it: learned positions, if any, in a table over text and video."""
        if not hasattr(self, "positions"):
            return self.transformer
        # Without diffusers' list of values left at their defaults, which `from_config` would not let change.
        config = {name: value for name, value in self.transformer.config.items() if not name.startswith("_")}
        finished = CogVideoXTransformer3DModel(**config | {"use_learned_positional_embeddings": True})
        positions = F.pad(self.positions.detach(), (0, 0, TEXT_LENGTH, 0))[None]
        finished.load_state_dict(self.transformer.state_dict() | {"patch_embed.pos_embedding": positions})
        return finished

    def forward(self, latents: Tensor, ids: Tensor, timesteps: Tensor) -> Tensor:
        """Predict v from noisy latents (B, T, C, H, W), token ids (B, L) and timesteps (B,)."""
        _, frames, _, height, width = latents.shape
        patch = self.transformer.config.patch_size
        bias = padding_bias(ids.shape[1], frames * (height // patch) * (width // patch))
        mask = {} if bias is None else {"attention_mask": bias[0].expand(len(ids), -1, -1)}
        return self.transformer(
            hidden_states=latents,
            encoder_hidden_states=encode(self.text_encoder, ids),
            timestep=timesteps,
            image_rotary_emb=_rotary(self.transformer.config.attention_head_dim, frames, height // patch),
            attention_kwargs=mask,
            return_dict=False,
        )[0]


def _rotary(head_dim: int, frames: int, side: int) -> tuple[Tensor, Tensor]:
    """The rotary tables the pipelines compute at the trained size."""
    cos, sin = get_3d_rotary_pos_embed(head_dim, ((0, 0), (side, side)), (side, side), frames)
    return cos, sin


@dataclass(frozen=True)
class Batch:
    """One training step's data: scaled latents and image conditions (B, T, C, H, W), captions, noise and timesteps.

    `said` has what the captions say, as `TextToLatents.attributes_loss` takes it.
    """

    latents: Tensor
    images: Tensor
    captions: list[str]
    said: Tensor
    noise: Tensor
    timesteps: Tensor


def batch_of(data: Latents, scale: float, size: int, data_seed: int, step: int) -> Batch:
    """Draw the clips, captions, noise and timesteps of one step.

    Timesteps are spread over the schedule, the noisy ones more densely: there the caption decides, later the pixels do.
    """
    rng = np.random.default_rng((data_seed, step, 3))
    generator = torch.Generator().manual_seed(data_seed * 1_000_003 + step)
    chosen = rng.integers(len(data.scenes), size=size)
    captions = captions_of([data.scenes[i] for i in chosen], (data_seed, step, 4))
    drop = rng.random(size) < DROP_CAPTION
    clips = _sampled(data.clips[chosen], scale, generator)
    images = torch.zeros_like(clips)
    images[:, :1] = _sampled(data.images[chosen], scale, generator)
    timesteps = (
        torch.from_numpy(((rng.permutation(size) + rng.random(size)) / size) ** NOISY * 1000).long().clamp(0, 999)
    )
    return Batch(
        latents=clips,
        images=images,
        captions=["" if dropped else caption for dropped, caption in zip(drop, captions, strict=True)],
        said=torch.tensor([_said(data.scenes[i], dropped) for i, dropped in zip(chosen, drop, strict=True)]),
        noise=torch.randn(clips.shape, generator=generator),
        timesteps=timesteps,
    )


def _said(scene: Scene, dropped: bool) -> list[int]:
    return [-100 if dropped else values.index(getattr(scene, name)) for name, values in ATTRIBUTES.items()]


def _sampled(parameters: Tensor, scale: float, generator: torch.Generator) -> Tensor:
    """Sample scaled latents (B, T, C, H, W) from posteriors (B, 2C, T, H, W)."""
    mean, logvar = parameters.chunk(2, dim=1)
    sample = mean + (0.5 * logvar).exp() * torch.randn(mean.shape, generator=generator)
    return (sample * scale).permute(0, 2, 1, 3, 4).contiguous()


def velocity_loss(network: TextToLatents, task: Task, batch: Batch, ids: Tensor) -> Tensor:
    """Mean squared error of the predicted v."""
    scheduler = new_scheduler()
    noisy = scheduler.add_noise(batch.latents, batch.noise, batch.timesteps)
    target = scheduler.get_velocity(batch.latents, batch.noise, batch.timesteps)
    if task == "image-to-video":
        noisy = torch.cat([noisy, batch.images], dim=2)
    return F.mse_loss(network(noisy, ids, batch.timesteps), target)


def start_from_text_to_video(network: TextToLatents, trained: TextToLatents) -> None:
    """Begin image-to-video where text-to-video ended; the image's input channels and the positions begin at zero."""
    weights = trained.state_dict()
    name = "transformer.patch_embed.proj.weight"
    weights[name] = torch.cat([weights[name], torch.zeros_like(weights[name])], dim=1)
    network.load_state_dict(weights | {"positions": network.positions.detach()})


@dataclass(frozen=True)
class Sources:
    """Where training reads from and writes to.

    Attributes:
        latents: Folder of `latents.py`.
        state: Folder of the training state.
        tokenizer: Folder of the tokenizer; made when it does not exist.
        start: State folder of text-to-video, for image-to-video.
    """

    latents: Path
    state: Path
    tokenizer: Path
    start: Path | None = None


def new_network(task: Task, size: Size, tokenizer: T5Tokenizer, start: Path | None) -> TextToLatents:
    """Make the network with its starting weights."""
    torch.manual_seed(0)
    network = TextToLatents(task, size, len(tokenizer))
    if start is not None:
        trained = TextToLatents("text-to-video", size, len(tokenizer))
        load_average(trained, start)
        start_from_text_to_video(network, trained)
    return network


def train_transformer(
    task: Task, sources: Sources, plan: Plan, data_seed: int, stop: int, size: Size | None = None,
    rhythm: Rhythm | None = None,
) -> Run:  # fmt: skip
    """Train until `stop` steps are done in all; resumes from the state folder."""
    tokenizer = load_tokenizer(sources.tokenizer)
    data = load_latents(sources.latents, data_seed)
    scale = data.scaling_factor()
    network = new_network(task, size or Size(), tokenizer, sources.start)
    learning = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, weight_decay=1e-2, betas=(0.9, 0.99), fused=True)
    run = Run(network, optimizer, sources.state, decay=0.999)

    def do_step(step: int) -> float:
        batch = batch_of(data, scale, plan.batch, data_seed, step)
        loss = velocity_loss(network, task, batch, token_ids(tokenizer, batch.captions, SHORT_LENGTH))
        run.update(loss + ATTRIBUTES_WEIGHT * network.attributes_loss(batch.said), plan.rate(step))
        return float(loss.detach())

    def measure() -> str:
        batch = batch_of(data, scale, 128, data_seed, 10**9)
        with torch.no_grad():
            loss = velocity_loss(network, task, batch, token_ids(tokenizer, batch.captions, SHORT_LENGTH))
            told = network.attributes_loss(batch.said)
        return f"averaged weights: loss {loss:.4f}, attributes {told:.4f} on fixed noise, scale {scale:.4f}"

    train(run, min(stop, plan.steps), rhythm or Rhythm(report=50), do_step, measure)
    return run


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latents", type=Path, required=True, help="folder of latents.py")
    parser.add_argument("--state", type=Path, required=True, help="folder of the resumable training state")
    parser.add_argument("--tokenizer", type=Path, help="folder of the tokenizer (default: beside the state)")
    parser.add_argument("--task", choices=("text-to-video", "image-to-video"), default="text-to-video")
    parser.add_argument("--start", type=Path, help="state folder of text-to-video that image-to-video starts from")
    parser.add_argument("--plan-steps", type=int, default=Plan().steps, help="length of the learning rate schedule")
    parser.add_argument("--steps", type=int, help="stop after this many steps in all (default: the plan's)")
    parser.add_argument("--data-seed", type=int, default=0, help="seed of the training videos")
    arguments = parser.parse_args()
    if (arguments.task == "image-to-video") != (arguments.start is not None):
        parser.error("--start goes with --task image-to-video, and the other way round")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    tokenizer = arguments.tokenizer or arguments.state.parent / "tokenizer"
    sources = Sources(arguments.latents, arguments.state, tokenizer, arguments.start)
    plan = Plan(steps=arguments.plan_steps)
    train_transformer(arguments.task, sources, plan, arguments.data_seed, arguments.steps or plan.steps)


if __name__ == "__main__":
    main()
