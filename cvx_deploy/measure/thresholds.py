"""How far results may be from eager PyTorch in fp32, by precision, with the reasons. Every parity check reads it."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from cvx_deploy.bundle.schema import Network


@dataclass(frozen=True)
class Thresholds:
    """The limits of one precision.

    Attributes:
        relative_max: Largest error of a network's output over its largest value.
        relative_l2: L2 norm of that error over the output's.
        cosine: Least cosine of the angle between the two.
        drift: Largest relative L2 error of the latents after any step, from the same noise.
        psnr: Least PSNR in dB of the whole video.
        ssim: Least structural similarity of its frames.
        flicker: Largest error of the change from frame to frame, mean over the pixels in [0, 1].
        reason: Why these.
    """

    relative_max: float
    relative_l2: float
    cosine: float
    drift: float
    psnr: float
    ssim: float
    flicker: float
    reason: str


ATTENTION = "fp8+attention"
"""The row of a transformer whose attention is quantized, whatever its linear layers are."""

# What was measured, and the margin above it. `mini`: 200 videos at 12 steps (benchmarks/results/quantization.md), and
# `cvx-deploy check` of bundles of it at 4 steps, from text and from a video; tiny: networks of a 5b of random weights.
# An error may be twice the largest of these; a video 3 dB worse than the lower quartile of the 200.
_FP16 = Thresholds(
    relative_max=6e-3,
    relative_l2=3e-3,
    cosine=1 - 4e-6,
    drift=1e-2,
    psnr=50.0,
    ssim=0.998,
    flicker=2e-3,
    reason="11 bits a product. Of `mini` a network was 0.0014 off, the drift 0.0047, its video 62 dB; engines that add "
    "up in fp16, too, may take more, so 12 dB are left",
)
_BF16 = Thresholds(
    relative_max=4e-2,
    relative_l2=2e-2,
    cosine=1 - 2e-4,
    drift=6e-2,
    psnr=35.0,
    ssim=0.97,
    flicker=8e-3,
    reason="8 bits a product, 8 times the rounding of fp16: about its limits times 8",
)
_INT8WO = Thresholds(
    relative_max=3e-2,
    relative_l2=2.4e-2,
    cosine=1 - 1.5e-4,
    drift=4e-2,
    psnr=40.0,
    ssim=0.995,
    flicker=3e-3,
    reason="weights of 8 bits with a scale a row. Networks were 0.0116 off, text encoders 0.0105 (tiny); drift 0.018, "
    "videos 46.4 dB, lower quartile 43.4",
)
_INT8 = Thresholds(
    relative_max=8e-2,
    relative_l2=5.5e-2,
    cosine=1 - 1.2e-3,
    drift=9e-2,
    psnr=33.5,
    ssim=0.97,
    flicker=9e-3,
    reason="activations of 8 bits besides: their outliers set the scale that all others are rounded by. Transformers "
    "were 0.027 off, drift 0.043, videos 39.5 dB, lower quartile 36.7",
)
_INT4WO = Thresholds(
    relative_max=3e-1,
    relative_l2=2.5e-1,
    cosine=1 - 1.6e-2,
    drift=4e-1,
    psnr=23.0,
    ssim=0.84,
    flicker=2.6e-2,
    reason="weights of 4 bits: 16 values for each group of 128. Rounded to nearest, transformers were 0.113 off, drift "
    "0.14, videos 28.8, lower quartile 26.1 dB",
)
_FP8 = Thresholds(
    relative_max=2e-1,
    relative_l2=9e-2,
    cosine=1 - 4e-3,
    drift=2.6e-1,
    psnr=30.0,
    ssim=0.93,
    flicker=1.7e-2,
    reason="4 bits a factor, with an exponent: 3% each, which sums average out. Transformers were 0.042 off, a text "
    "encoder 0.077 (tiny, 0.16 at its worst value); drift 0.128, videos 35.1 dB, lower quartile 32.9",
)
_FP8_ATTENTION = replace(
    _FP8,
    relative_l2=1.4e-1,
    cosine=1 - 5e-3,
    drift=4.6e-1,
    psnr=24.0,
    ssim=0.78,
    flicker=3.1e-2,
    reason="queries, keys, values and weights of attention in 4 bits, too. Transformers were 0.069 off, drift 0.23, "
    "videos 29.9 dB, lower quartile 27.1",
)

THRESHOLDS: dict[str, Thresholds] = {
    "fp32": Thresholds(
        relative_max=2e-5,
        relative_l2=1e-5,
        cosine=1 - 1e-9,
        drift=1e-4,
        psnr=70.0,
        ssim=0.9999,
        flicker=1e-4,
        reason="float32 sums in another order, hundreds of layers deep; guidance multiplies the error of a step by "
        "about ten. 8-bit rounding alone is 59 dB",
    ),
    "tf32": replace(
        _FP16,
        relative_max=2e-2,
        relative_l2=1e-2,
        reason="a GPU's tensor cores round the factors of float32 products to 10 bits; never measured, so they have "
        "3 times the room of fp16",
    ),
    "fp16": _FP16,
    "bf16": _BF16,
    "int8wo": _INT8WO,
    "int4wo": _INT4WO,
    "int8": _INT8,
    "fp8": _FP8,
    ATTENTION: _FP8_ATTENTION,
}
"""By precision; a result is held against its own, a finer one's results pass a coarser one's limits."""


@dataclass(frozen=True)
class ForecastLimits:
    """How far a video whose steps are half forecast may be from that of the same seed whose steps were all run.

    That is no parity: the full run is the engine's own.

    Attributes:
        psnr: Least PSNR in dB; `ssim` likewise, and `flicker` at most, as in `Thresholds`.
        reason: Why these.
    """

    psnr: float
    ssim: float
    flicker: float
    reason: str


FORECAST: dict[str, ForecastLimits] = {
    "ddim": ForecastLimits(
        46.0, 0.99, 3e-3, reason="of 100 videos of the miniature nine in ten are at 54 dB or better: it draws nothing"
    ),
    "dpm": ForecastLimits(
        20.0, 0.6, 2e-2, reason="each step draws noise: where an error meets it early, the video goes another way"
    ),
}
"""By scheduler, for ``--fast``."""


def row_of(network: Network) -> str:
    """Return which row a network is held against: that of what it computes in, or its scheme's where that is wider."""
    found = network.quantization
    if found is None:
        return network.precision
    return coarsest([network.precision, found.scheme, *([ATTENTION] if found.attention else [])])


def coarsest(rows: Iterable[str]) -> str:
    """Return the row with the widest limits: a whole run is as good as its worst network."""
    return min(rows, key=lambda row: THRESHOLDS[row].psnr)
