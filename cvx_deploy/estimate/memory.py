"""How much memory each network takes: on a GPU as compiled by TensorRT, and on a CPU in ONNX Runtime.

Weights and causal caches follow from the architecture. What lies between kernels is taken to be proportional to one
tensor of the network, its *unit*; how many units that are was read off compiled plans and measured sessions, which
``benchmarks/plan_memory.py`` makes. Tests fit the constants to one size, and hold what follows for others within 15%.
"""

import math
from dataclasses import dataclass, replace
from typing import Final, Literal, cast, get_args

from cvx_deploy.families.cogvideox.architecture import Architecture
from cvx_deploy.graph.streamed import LARGE_NETWORK
from cvx_deploy.graph.tiled_attention import TILED_CELLS
from cvx_deploy.precision import SchemeName
from cvx_deploy.shape import Shape

NetworkName = Literal["text_encoder", "modulation", "transformer", "vae_decoder"]
NETWORKS: Final[tuple[NetworkName, ...]] = get_args(NetworkName)
PrecisionName = Literal["fp32", "fp16", "bf16", "int8", "int8wo", "int4wo", "fp8"]
PRECISIONS: Final[tuple[PrecisionName, ...]] = get_args(PrecisionName)
Native = Literal["fp16", "bf16"]

WORKSPACE: Final = 600 << 20
"""Bytes for the CUDA context, libraries and their own workspace: an assumption, no GPU was at hand to measure it."""
TILE: Final = (240, 360)
"""Pixels of a tile of the published VAE: half its ``sample_height`` and ``sample_width``, as in diffusers."""

_LINEAR_BYTES: Final = {"int8": 1.0, "int8wo": 1.0, "fp8": 1.0, "int4wo": 0.5 + 2 / 128}
"""Bytes of a quantized weight; in 4 bits with a scale of 2 bytes for every 128."""

# Units of activations in a compiled plan of TensorRT for RTX 1.7, bf16.
_GPU_TRANSFORMER: Final = {1: 12.2, 2: 9.7}  # of tokens x width; for one sample alone the compiler shares less memory
_GPU_TEXT = 16.0  # of tokens x width
_GPU_DECODER = 6.9  # of a chunk's pixels x the channels of the last block
_GPU_MODULATION = 26.0  # of its output

# ONNX Runtime 1.32 on a CPU, fp32, weights published in half precision.
_CPU_TRANSFORMER = 19.2  # beside the scores
CPU_TRANSFORMER_TILED = 22.0  # where there are none: 19.7 were measured for one sample of 8,026 tokens, 25.0 for two
CPU_TEXT = 16.0
CPU_DECODER = 11.0  # without a memory pattern, which would add to it from the second run on
CPU_STATE = 3.7  # of the caches: what it reads, writes, and puts before the frames of a chunk
CPU_HELD: Final = {"text_encoder": 1.02, "modulation": 1.46, "transformer": 1.03, "vae_decoder": 1.61}
"""Bytes held for a byte of weights: converted, and arranged for its kernels."""
_CPU_LOADING: Final = {"text_encoder": 2.4, "modulation": 1.77, "transformer": 2.55, "vae_decoder": 1.65}
"""Bytes at the peak of loading for a byte of weights: the converted and the arranged ones beside each other."""
_CPU_STREAMED: Final = {"text_encoder": 2.6, "modulation": 1.6, "transformer": 2.0}
"""Of a network whose weights stay in their file: how many of its largest matrix lie converted beside each other."""
_CPU_TEXT_LAYER: Final = 3 << 20  # what the nodes of a layer take, of T5, of the transformer, and of the whole VAE
_CPU_LAYER: Final = 2 << 20
_CPU_DECODER_NODES: Final = 14 << 20


@dataclass(frozen=True)
class Needs:
    """Bytes that a network needs.

    Attributes:
        weights: In the type it keeps them in.
        activations: What lies between its kernels, at its peak.
        state: The VAE's causal caches, those it reads and those it writes.
    """

    weights: int
    activations: int
    state: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.activations + self.state


def computes_in(precision: PrecisionName, native: Native) -> Literal["fp32", "fp16", "bf16"]:
    """Return the type that all computes in that is not quantized: the published one where a scheme is named."""
    return native if precision not in ("fp32", "fp16", "bf16") else precision


def item_bytes(precision: PrecisionName) -> int:
    """Return the bytes of an activation."""
    return 4 if precision == "fp32" else 2


def weight_bytes(architecture: Architecture, precision: PrecisionName) -> dict[NetworkName, int]:
    """Return the bytes of each network's weights.

    Quantized are the linear layers of the transformer's blocks, but for those that are spared, and T5's to 8 bits.
    """
    item = item_bytes(precision)
    transformer, text = architecture.transformer, architecture.text_encoder
    linear = _LINEAR_BYTES.get(precision, item)
    text_linear = min(item, 1.0) if precision in _LINEAR_BYTES else item
    return {
        "text_encoder": _mixed(text.parameters, text.linear_parameters, item, text_linear),
        "modulation": transformer.modulation_parameters * item,
        "transformer": _mixed(transformer.parameters, _quantized(architecture, precision), item, linear),
        "vae_decoder": architecture.vae.parameters("decoder") * item,
    }


def _quantized(architecture: Architecture, precision: PrecisionName) -> int:
    """Return how many parameters of the transformer have fewer bits than the rest."""
    if precision not in get_args(SchemeName):
        return 0
    transformer, spared = architecture.transformer, len(architecture.spared_blocks(cast(SchemeName, precision)))
    return transformer.linear_parameters // transformer.layers * (transformer.layers - spared)


def gpu_needs(
    architecture: Architecture, shape: Shape, precision: PrecisionName, native: Native, batch: int
) -> dict[NetworkName, Needs]:
    """Return what every network needs on a GPU, compiled by TensorRT.

    Of a video of several chunks, the VAE's first and next network each hold all weights, and the caches lie in two sets
    of buffers, of which a run reads one and writes the other.
    """
    weights, item = weight_bytes(architecture, precision), item_bytes(precision)
    state = architecture.decoder_state(shape)
    state_item = 4 if computes_in(precision, native) == "fp32" else 2
    scores = 2 * _scores(architecture, shape, batch) if precision == "fp32" else 0  # no fused attention kernel
    return {
        "text_encoder": Needs(weights["text_encoder"], _units(_GPU_TEXT, _text_unit(architecture, item))),
        "modulation": Needs(weights["modulation"], _units(_GPU_MODULATION, _modulation_rows(architecture))),
        "transformer": Needs(
            weights["transformer"],
            _units(_GPU_TRANSFORMER[min(batch, 2)], _token_unit(architecture, shape, batch, item)) + scores,
        ),
        "vae_decoder": Needs(
            weights["vae_decoder"] * (2 if state else 1),
            _units(_GPU_DECODER, _pixel_unit(architecture, shape, item)),
            2 * state * state_item,
        ),
    }


def cpu_needs(architecture: Architecture, shape: Shape, batch: int) -> dict[NetworkName, Needs]:
    """Return what every network needs once it has been loaded in ONNX Runtime on a CPU, in fp32.

    Attention of few tokens holds the scores of all pairs, that of many goes through them in tiles. A video of several
    chunks has two sessions of the VAE, each with weights and memory of its own.
    """
    held = _cpu_held(architecture)
    text, transformer = architecture.text_encoder, architecture.transformer
    text_scores = 4 * text.heads * transformer.text_length**2
    state = architecture.decoder_state(shape)
    sessions = 2 if state else 1
    return {
        "text_encoder": Needs(
            held["text_encoder"] + _CPU_TEXT_LAYER * text.layers,
            _units(CPU_TEXT, _text_unit(architecture, 4)) + text_scores,
        ),
        "modulation": Needs(held["modulation"], _modulation_rows(architecture)),
        "transformer": Needs(
            held["transformer"] + _CPU_LAYER * transformer.layers,
            _cpu_transformer(architecture, shape, batch),
        ),
        "vae_decoder": Needs(
            sessions * (held["vae_decoder"] + _CPU_DECODER_NODES),
            _units(sessions * CPU_DECODER, _pixel_unit(architecture, shape, 4)),
            _units(sessions * CPU_STATE, state * 4),
        ),
    }


def cpu_peak(architecture: Architecture, shape: Shape, batch: int) -> dict[NetworkName, int]:
    """Return the most memory each network takes in ONNX Runtime, loading it and running it."""
    weights, needs = weight_bytes(architecture, "fp32"), cpu_needs(architecture, shape, batch)
    streamed = _streamed(architecture)
    loading = {name: 0 if name in streamed else int(_CPU_LOADING[name] * weights[name]) for name in NETWORKS}
    return {name: max(loading[name], needs[name].total) for name in NETWORKS}


def _cpu_held(architecture: Architecture) -> dict[NetworkName, int]:
    """Return the bytes that each network's weights take, converted to float32."""
    streamed, weights = _streamed(architecture), weight_bytes(architecture, "fp32")
    return {
        name: int(_CPU_STREAMED[name] * streamed[name]) if name in streamed else int(CPU_HELD[name] * weights[name])
        for name in NETWORKS
    }


def _streamed(architecture: Architecture) -> dict[NetworkName, int]:
    """Return the networks whose weights stay in their file, published in 16 bits, and the largest matrix of each."""
    text, transformer = architecture.text_encoder, architecture.transformer
    matrices: dict[NetworkName, int] = {
        "text_encoder": 4 * text.width * text.hidden,
        "modulation": 4 * transformer.time_dim * 6 * transformer.width,
        "transformer": 4 * transformer.width * 4 * transformer.width,
    }
    weights = weight_bytes(architecture, "bf16")
    files = {name: weights[name] for name in matrices}
    files["modulation"] = files["transformer"] = weights["modulation"] + weights["transformer"]
    return {name: matrix for name, matrix in matrices.items() if files[name] >= LARGE_NETWORK}


def tiled(shape: Shape) -> Shape:
    """Return the shape that a published VAE works at when it decodes tile by tile."""
    return replace(shape, height=min(shape.height, TILE[0]), width=min(shape.width, TILE[1]))


def _mixed(parameters: int, linear: int, item: float, linear_item: float) -> int:
    return math.ceil((parameters - linear) * item + linear * linear_item)


def _units(count: float, unit: int) -> int:
    return round(count * unit)


def _text_unit(architecture: Architecture, item: int) -> int:
    return architecture.transformer.text_length * architecture.text_encoder.width * item


def _token_unit(architecture: Architecture, shape: Shape, batch: int, item: int) -> int:
    return batch * architecture.tokens(shape) * architecture.transformer.width * item


def _scores(architecture: Architecture, shape: Shape, batch: int) -> int:
    """Return the bytes of one float32 for every head and every pair of tokens."""
    return 4 * batch * architecture.transformer.heads * architecture.tokens(shape) ** 2


def _cpu_transformer(architecture: Architecture, shape: Shape, batch: int) -> int:
    unit = _token_unit(architecture, shape, batch, 4)
    if math.prod(architecture.latents(shape)) >= TILED_CELLS:
        return _units(CPU_TRANSFORMER_TILED, unit)
    return _units(_CPU_TRANSFORMER, unit) + _scores(architecture, shape, batch)


def _pixel_unit(architecture: Architecture, shape: Shape, item: int) -> int:
    """Return the bytes of the largest chunk's frames, with as many channels as the decoder's last block has."""
    chunk = architecture.first_chunk(shape)
    frames = chunk % 2 + (chunk - chunk % 2) * architecture.vae.temporal
    return frames * shape.height * shape.width * architecture.vae.channels[0] * item


def _modulation_rows(architecture: Architecture) -> int:
    """Return the bytes of the modulation network's output, in float32."""
    return 4 * (12 * architecture.transformer.layers + 2) * architecture.transformer.width
