"""How long a GPU takes at best: a roofline over the compiled plan where there is one, else over the architecture.

Arithmetic runs at the GPU's peak for its type. What lies between matrix products moves at full bandwidth; how much that
is was read off compiled plans (docs/rewrites.md). It is an estimate from below, as `build.roofline` is.
"""

from dataclasses import dataclass
from typing import Final, Literal

from cvx_deploy.engines.gpus import GpuModel
from cvx_deploy.estimate.memory import Native, PrecisionName, computes_in, item_bytes, weight_bytes
from cvx_deploy.families.cogvideox.architecture import Architecture
from cvx_deploy.shape import Shape

Source = Literal["architecture", "compiled plan"]

_TYPES: Final = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
_LINEAR_TYPES: Final = {"int8": "int8", "fp8": "float8"}

# Tensors of tokens x width that a block moves, in a compiled plan of two 5b blocks.
_BETWEEN_PRODUCTS = 23.3
_IN_PRODUCTS = 17.0
# Tensors of pixels x channels of the last block that the decoder moves between its convolutions.
_BETWEEN_CONVOLUTIONS = 85.0


@dataclass(frozen=True)
class Speed:
    """The least seconds of the parts of a run on one GPU.

    Attributes:
        step: One denoising step.
        source: What the step was priced by.
    """

    text_encoder: float
    step: float
    decode: float
    source: Source

    def video(self, steps: int) -> float:
        """Return the least seconds of a video."""
        return self.text_encoder + steps * self.step + self.decode


def speed(
    architecture: Architecture, shape: Shape, precision: PrecisionName, batch: int, gpu: GpuModel, native: Native
) -> Speed | None:
    """Return the least time by the architecture; None where the GPU has no units for a type.

    Args:
        architecture: The model's.
        shape: The video's.
        precision: Of the weights and linear layers.
        batch: 2 with guidance.
        gpu: Where it runs.
        native: The type the model was published in.
    """
    computing = _TYPES[computes_in(precision, native)]
    half, linear = gpu.peak(computing), gpu.peak(_LINEAR_TYPES.get(precision, computing))
    if half is None or linear is None:
        return None
    transformer, item = architecture.transformer, item_bytes(precision)
    tokens, weights = architecture.tokens(shape), weight_bytes(architecture, precision)
    unit = batch * tokens * transformer.width * item
    products = batch * transformer.linear_flops(tokens) / linear
    moved = (weights["transformer"] + _IN_PRODUCTS * transformer.layers * unit) / gpu.bandwidth
    attention = batch * transformer.attention_flops(tokens) / half
    between = _BETWEEN_PRODUCTS * transformer.layers * unit / gpu.bandwidth
    text = max(
        2 * architecture.text_encoder.flops(transformer.text_length) / half,
        2 * weights["text_encoder"] / gpu.bandwidth,
    )
    return Speed(text, max(products, moved) + attention + between, _decode(architecture, shape, item, half, gpu),
                 "architecture")  # fmt: skip


def _decode(architecture: Architecture, shape: Shape, item: int, peak: float, gpu: GpuModel) -> float:
    unit = shape.frames * shape.height * shape.width * architecture.vae.channels[0] * item
    arithmetic = architecture.vae.flops("decoder", architecture.latents(shape)) / peak
    return arithmetic + _BETWEEN_CONVOLUTIONS * unit / gpu.bandwidth
