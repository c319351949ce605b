"""What a CogVideoX is made of: parameters, operations and causal caches of every network, by formula.

The layers are those of diffusers' CogVideoXTransformer3DModel and AutoencoderKLCogVideoX and of transformers'
T5EncoderModel. Tests hold the parameters and caches against real exports, to the last one, and the operations against
compiled plans.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from cvx_deploy.families.cogvideox.layers import spared_blocks
from cvx_deploy.families.cogvideox.models import Model
from cvx_deploy.precision import SchemeName
from cvx_deploy.shape import Shape

_CHUNK = 2
"""Latent frames that the VAE decodes at a time."""


@dataclass(frozen=True)
class Transformer:
    """A CogVideoXTransformer3DModel.

    Attributes:
        patch_frames: Latent frames a token spans; None before version 1.5.
        learned_positions: How many tokens have a learned position; 0 where positions are computed.
        ofs: Whether it takes an ``ofs`` embedding.
    """

    layers: int
    heads: int
    head_dim: int
    in_channels: int
    out_channels: int = 16
    patch: int = 2
    patch_frames: int | None = None
    text_dim: int = 4096
    time_dim: int = 512
    text_length: int = 226
    learned_positions: int = 0
    ofs: bool = False

    @property
    def width(self) -> int:
        """Features of a token."""
        return self.heads * self.head_dim

    @property
    def modulation_parameters(self) -> int:
        """Parameters of the modulation network: time and ofs embeddings, and the projections of all adaLN layers."""
        time = self.time_dim**2 * (1 + 2 * self.ofs) + self.time_dim * (1 + 2 * self.ofs)
        time += self.width * self.time_dim + self.time_dim
        rows = 2 * 6 * self.width * self.layers + 2 * self.width
        return time + (self.time_dim + 1) * rows

    @property
    def linear_parameters(self) -> int:
        """Parameters of the linear layers in the blocks, what is quantized: four of attention, two more."""
        return self.layers * (12 * self.width**2 + 9 * self.width)

    @property
    def parameters(self) -> int:
        """All parameters but the modulation network's."""
        span = self.patch_frames or 1
        patch = self.in_channels * self.patch**2 * span * self.width + self.width
        out = (self.width + 1) * self.out_channels * self.patch**2 * span
        norms = self.layers * (4 * self.width + 4 * self.head_dim) + 4 * self.width
        text = (self.text_dim + 1) * self.width
        return self.linear_parameters + patch + out + norms + text + self.learned_positions * self.width

    def tokens(self, latent_frames: int, height: int, width: int) -> int:
        """Return text and video tokens of a clip of latents."""
        frames = -(-latent_frames // (self.patch_frames or 1))
        return self.text_length + frames * (height // self.patch) * (width // self.patch)

    def linear_flops(self, tokens: int) -> int:
        """Return the operations of the blocks' linear layers, for one sample."""
        return 24 * self.layers * tokens * self.width**2

    def attention_flops(self, tokens: int) -> int:
        """Return the operations of ``q k^T`` and its product with v, for one sample."""
        return 4 * self.layers * tokens**2 * self.width


@dataclass(frozen=True)
class TextEncoder:
    """A T5EncoderModel; the defaults are T5 v1.1 XXL."""

    layers: int = 24
    width: int = 4096
    heads: int = 64
    head_dim: int = 64
    hidden: int = 10240
    vocabulary: int = 32128
    buckets: int = 32

    @property
    def linear_parameters(self) -> int:
        """Parameters of the linear layers: four of attention, three of the gated rest."""
        inner = self.heads * self.head_dim
        return self.layers * (4 * self.width * inner + 3 * self.width * self.hidden)

    @property
    def parameters(self) -> int:
        """All parameters."""
        norms = (2 * self.layers + 1) * self.width
        return self.linear_parameters + norms + self.vocabulary * self.width + self.buckets * self.heads

    def flops(self, tokens: int) -> int:
        """Return the operations on one text."""
        inner = self.heads * self.head_dim
        return 2 * tokens * self.linear_parameters + 4 * self.layers * tokens**2 * inner


@dataclass(frozen=True)
class Convolution:
    """One convolution of the VAE.

    Attributes:
        kernel: Elements of its kernel; `temporal` of them in time.
        plane: Cells a latent spans, in height and in width, where it works.
        frames: Frames it puts out for a latent frame.
    """

    inputs: int
    outputs: int
    kernel: int
    temporal: int
    plane: int
    frames: int

    @property
    def parameters(self) -> int:
        """Weights and biases."""
        return (self.inputs * self.kernel + 1) * self.outputs

    def cached(self, height: int, width: int) -> int:
        """Return the elements that it keeps for the next chunk: the last frames of its input."""
        return (self.temporal - 1) * self.inputs * self.plane**2 * height * width

    def flops(self, latent_frames: int, height: int, width: int) -> int:
        """Return its operations on latents, chunk by chunk or all at once: the first of an odd number is one frame."""
        frames = latent_frames % 2 + (latent_frames - latent_frames % 2) * self.frames
        return 2 * frames * self.plane**2 * height * width * self.inputs * self.kernel * self.outputs


@dataclass(frozen=True)
class Vae:
    """An AutoencoderKLCogVideoX; the defaults are the published one."""

    channels: tuple[int, ...] = (128, 256, 256, 512)
    layers: int = 3
    latent_channels: int = 16
    temporal: int = 4

    @property
    def spatial(self) -> int:
        """Pixels a latent spans."""
        return int(2 ** (len(self.channels) - 1))

    def flops(self, half: Literal["encoder", "decoder"], latents: tuple[int, int, int]) -> int:
        """Return the operations of a half on latents: frames, height and width."""
        return sum(conv.flops(*latents) for conv in self.convolutions(half))

    def parameters(self, half: Literal["encoder", "decoder"]) -> int:
        """Return the parameters of a half."""
        return sum(conv.parameters for conv in self.convolutions(half)) + 2 * sum(self._norms(half))

    def convolutions(self, half: Literal["encoder", "decoder"]) -> Iterator[Convolution]:
        """Yield the convolutions of a half; those of the encoder as if time ran backwards."""
        return self._decoder() if half == "decoder" else self._encoder()

    def _decoder(self) -> Iterator[Convolution]:
        widths = self.channels[::-1]
        yield Convolution(self.latent_channels, widths[0], 27, 3, 1, 1)
        for _ in range(2):
            yield from self._block(widths[0], widths[0], 1, 1, guided=True)
        before = widths[0]
        for index, width in enumerate(widths):
            plane, frames = 2**index, min(2**index, self.temporal)
            for layer in range(self.layers + 1):
                yield from self._block(before if layer == 0 else width, width, plane, frames, guided=True)
            if index < len(widths) - 1:
                yield Convolution(width, width, 9, 1, 2 * plane, min(2 * frames, self.temporal))
            before = width
        yield from self._guides(widths[-1])
        yield Convolution(widths[-1], 3, 27, 3, self.spatial, self.temporal)

    def _encoder(self) -> Iterator[Convolution]:
        yield Convolution(3, self.channels[0], 27, 3, self.spatial, self.temporal)
        before = self.channels[0]
        for index, width in enumerate(self.channels):
            plane, frames = self.spatial // 2**index, max(self.temporal // 2**index, 1)
            for layer in range(self.layers):
                yield from self._block(before if layer == 0 else width, width, plane, frames, guided=False)
            if index < len(self.channels) - 1:
                yield Convolution(width, width, 9, 1, plane // 2, max(frames // 2, 1))
            before = width
        for _ in range(2):
            yield from self._block(before, before, 1, 1, guided=False)
        yield Convolution(before, 2 * self.latent_channels, 27, 3, 1, 1)

    def _block(self, inputs: int, outputs: int, plane: int, frames: int, *, guided: bool) -> Iterator[Convolution]:
        """Yield the convolutions of a residual block; in the decoder its norms have two each, at the latents' size."""
        for width in (inputs, outputs):
            if guided:
                yield from self._guides(width)
            yield Convolution(width, outputs, 27, 3, plane, frames)
        if inputs != outputs:
            yield Convolution(inputs, outputs, 1, 1, plane, frames)

    def _guides(self, width: int) -> Iterator[Convolution]:
        for _ in range(2):
            yield Convolution(self.latent_channels, width, 1, 1, 1, 1)

    def _norms(self, half: Literal["encoder", "decoder"]) -> Iterator[int]:
        """Yield the channels of every group norm: one before each causal convolution but the first."""
        causal = [conv for conv in self.convolutions(half) if conv.temporal > 1]
        yield from (conv.inputs for conv in causal[1:])


@dataclass(frozen=True)
class Architecture:
    """The networks of a model."""

    transformer: Transformer
    text_encoder: TextEncoder
    vae: Vae

    @classmethod
    def of_model(cls, model: Model) -> "Architecture":
        """Return a published model's."""
        traits = model.traits
        latents = (1 + (model.frames - 1) // 4, model.sample_height // 2, model.sample_width // 2)
        positions = 226 + latents[0] * latents[1] * latents[2] if traits.positions == "rope+learned" else 0
        transformer = Transformer(
            layers=model.num_layers,
            heads=model.num_attention_heads,
            head_dim=model.attention_head_dim,
            in_channels=32 if traits.task == "image-to-video" else 16,
            patch_frames=traits.patch_size_t,
            learned_positions=positions,
            ofs=traits.ofs,
        )
        return cls(transformer, TextEncoder(), Vae())

    def latents(self, shape: Shape) -> tuple[int, int, int]:
        """Return latent frames, height and width of a video; 8k frames have 2k latent ones, 8k + 1 one more."""
        frames = -(-shape.frames // self.vae.temporal)
        return frames, shape.height // self.vae.spatial, shape.width // self.vae.spatial

    def tokens(self, shape: Shape) -> int:
        """Return the tokens that the transformer works on, text included."""
        return self.transformer.tokens(*self.latents(shape))

    def first_chunk(self, shape: Shape) -> int:
        """Return the latent frames that the VAE decodes first; it is the largest chunk."""
        frames = self.latents(shape)[0]
        return frames if frames < _CHUNK else _CHUNK + frames % _CHUNK

    def spared_blocks(self, scheme: SchemeName) -> range:
        """Return which of the transformer's blocks a scheme leaves as they are where nothing else is asked for."""
        return spared_blocks(scheme, self.transformer.layers)

    def decoder_state(self, shape: Shape) -> int:
        """Return the elements of the decoder's causal caches; 0 for a video of one chunk."""
        frames, height, width = self.latents(shape)
        if frames == self.first_chunk(shape):
            return 0
        return sum(conv.cached(height, width) for conv in self.vae.convolutions("decoder"))
